"""Gemma 4, text only. As Gemma 3, with these differences: layers that see all keys have larger heads, whose values may
be their keys, and a rope of which most pairs stand still; values are normed, scores are not scaled; the last layers may
read the keys and values of earlier ones; a layer may have an input of its own for each token, and ends with a factor.

The embedding's factor is that of `gemma3.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lockstep.models.config import Config, cap_of, check_keys, flag, layer_types, need, optional
from lockstep.models.decoder import decoder
from lockstep.models.experts import experts
from lockstep.models.families.gemma.gemma3 import completed, embed_scale
from lockstep.models.families.gemma.gemma4_gguf import NAMES, TOP_NAMES, VARYING, config_of, proportional
from lockstep.models.families.llama_like import (
    biases,
    feed_forward,
    mlp_of,
    model_of,
    num_layers,
    self_attention,
    with_windows,
)
from lockstep.models.family import Family
from lockstep.models.model_config import Experts, Heads, Layer, ModelConfig, checked_head_dim
from lockstep.models.per_layer import gated_input, per_layer_inputs
from lockstep.models.record import Norm, Recorder
from lockstep.models.rope_config import ropes_by_type
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture

SLIDING, FULL = "sliding_attention", "full_attention"
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
THETAS = {FULL: 1e6, SLIDING: 1e4}
DEFAULTS = dict(
    vocab_size=262_144, num_attention_heads=8, num_key_value_heads=4, head_dim=256, global_head_dim=512,
    rms_norm_eps=1e-6, max_position_embeddings=131_072, sliding_window=512, hidden_activation="gelu_pytorch_tanh",
    rope_parameters=ROPES, vocab_size_per_layer_input=262_144,
)  # fmt: skip
INPUTS = "hidden_size_per_layer_input"
SIZES = ("head_dim", "num_key_value_heads")  # what may differ between layers
UNIFIED = dict(max_position_embeddings=262_144, sliding_window=1024)  # other defaults of gemma4_unified
KEYS = """hidden_activation sliding_window layer_types attention_bias final_logit_softcapping attention_k_eq_v
global_head_dim num_global_key_value_heads per_layer_config num_kv_shared_layers use_double_wide_mlp
use_bidirectional_attention hidden_size_per_layer_input vocab_size_per_layer_input enable_moe_block num_experts
top_k_experts moe_intermediate_size expert_intermediate_size""".split()

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig; keys that a text_config leaves out have the values of `DEFAULTS`."""
    check_keys(config, KEYS, free=["hidden_act"])
    is_unified = config["model_type"] == "gemma4_unified_text"
    input_width = optional({INPUTS: 0 if is_unified else 256, **config}, INPUTS, 0, low=0)
    config = completed(config, {**DEFAULTS, **UNIFIED} if is_unified else DEFAULTS)
    if config.get("use_bidirectional_attention") not in (None, "vision"):
        raise ValueError("config key 'use_bidirectional_attention': only null and 'vision' are supported")
    if input_width and need(config, "vocab_size_per_layer_input") != need(config, "vocab_size"):
        raise ValueError("config key 'vocab_size_per_layer_input': only the vocab_size itself is supported")
    layers = with_shared_keys(plain_layers(config), types_of(config), config)
    chosen = experts_of(config) if flag(config, "enable_moe_block") else None
    layers = [replace(layer, input_width=input_width, experts=chosen) for layer in layers]
    return model_of(config, layers, tied=True, logit_cap=cap_of(config, "final_logit_softcapping"))


def types_of(config: Config) -> list[str]:
    """The type of each layer; the last one always sees all keys, as in transformers."""
    types = layer_types(config, SLIDING, FULL)
    types = types or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(num_layers(config))]
    return [*types[:-1], FULL]


def plain_layers(config: Config) -> list[Layer]:
    """The layers, each with keys and values of its own."""
    types, mlp = types_of(config), mlp_of(config, activation="gelu_tanh")
    sizes = sizes_of(config, types)
    layers = [
        Layer(heads_of(config, head_dim, num_kv_heads, layer_type), mlp)
        for (head_dim, num_kv_heads), layer_type in zip(sizes, types, strict=True)
    ]
    return with_windows(layers, config, types)


def heads_of(config: Config, head_dim: int, num_kv_heads: int, layer_type: str) -> Heads:
    """The heads of a layer, still without their window."""
    return Heads(
        need(config, "num_attention_heads"),
        num_kv_heads,
        checked_head_dim(head_dim),
        scale=1.0,
        rope=ropes_by_type(config, head_dim, THETAS)[layer_type],
        own_values=layer_type == SLIDING or not flag(config, "attention_k_eq_v"),
        norms_values=True,
        **biases(config),
    )


def sizes_of(config: Config, types: Sequence[str]) -> list[list[int]]:
    """[head_dim, kv heads] of each layer: from per_layer_config, as transformers 5 writes it, or by its type."""
    own = config.get("per_layer_config")
    if own is None:
        full = dict(head_dim=config["global_head_dim"])
        if config.get("num_global_key_value_heads") is not None and flag(config, "attention_k_eq_v"):
            full["num_key_value_heads"] = config["num_global_key_value_heads"]
        own = {str(i): full for i, layer_type in enumerate(types) if layer_type == FULL}
    if not isinstance(own, dict) or not all(isinstance(sizes, dict) for sizes in own.values()):
        raise ValueError("config key 'per_layer_config': expected an object with an object for each of some layers")
    layers = [str(i) for i in range(len(types))]
    if strange := next((i for i in own if i not in layers), None):
        raise ValueError(f"config key 'per_layer_config': {strange!r} is none of {len(types)} layers")
    if strange := next((key for sizes in own.values() for key in sizes if key not in SIZES), None):
        raise ValueError(f"config key 'per_layer_config': {strange!r} is not supported, only {' and '.join(SIZES)}")
    return [[need({**config, **own.get(i, {})}, key) for key in SIZES] for i in layers]


def with_shared_keys(layers: Sequence[Layer], types: Sequence[str], config: Config) -> list[Layer]:
    """The layers, of which the last num_kv_shared_layers read the keys and values of the last layer before them that
    has their type. With use_double_wide_mlp these have MLPs of twice the width."""
    first = len(layers) - optional(config, "num_kv_shared_layers", 0, low=0)
    owners = {layer_type: i for i, layer_type in enumerate(types[: max(first, 0)])}
    if first < 0 or not set(types[first:]) <= owners.keys():
        raise ValueError(f"config key 'num_kv_shared_layers': {len(layers) - first} leave no layer of each type before")
    factor = 2 if flag(config, "use_double_wide_mlp") else 1
    return [
        *layers[:first],
        *(shared(layer, owners[types[first + i]], factor) for i, layer in enumerate(layers[first:])),
    ]


def shared(layer: Layer, owner: int, factor: int) -> Layer:
    """A layer that reads another one's keys and values, with a wider MLP."""
    return replace(
        layer,
        mixer=replace(layer.mixer, keys_of=owner, own_values=True),
        mlp=replace(layer.mlp, width=factor * layer.mlp.width),
    )


def experts_of(config: Config) -> Experts:
    """The shape of the experts beside each MLP, whose weights sum to 1 before each expert's own factor."""
    num_experts, key = need(config, "num_experts", high=4096), "moe_intermediate_size"
    width = need(config, key if config.get(key) is not None else "expert_intermediate_size")
    return Experts(num_experts, need(config, "top_k_experts", high=min(num_experts, 256)), width, True, "gelu_tanh")


# ------------------------------------------------------------ the model


def record(ops: Recorder, config: ModelConfig) -> Tensor:
    """Records the model; returns its logits."""
    inputs: list[Tensor] = []  # of all layers, made of the embedded tokens, which the first layer is given

    def with_inputs(ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str) -> Tensor:
        if shape.input_width and not inputs:
            inputs.append(per_layer_inputs(ops, x, config))
        return layer(ops, x, config, shape, label, inputs[0] if inputs else None)

    return decoder(ops, config, with_inputs, embed_scale=embed_scale(config))


def layer(
    ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str, inputs: Tensor | None = None
) -> Tensor:
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x))); x += norm(gated input); x *= the layer's factor.

    With experts the second sum is x += norm(norm(mlp(norm(x))) + norm(experts(norm(x)))). inputs: of all layers.
    """

    def norm(h: Tensor, name: str) -> Tensor:
        return ops.rms_norm(h, f"{label}.{name}.weight", config.rms_eps)

    h, factor = norm(x, "input_layernorm"), f"{label}.layer_scalar"
    h = self_attention(ops, h, shape.mixer, f"{label}.self_attn", head_norms=Norm(config.rms_eps))
    x = ops.add(x, norm(h, "post_attention_layernorm"))
    h = feed_forward(ops, norm(x, "pre_feedforward_layernorm"), shape.mlp, f"{label}.mlp")
    if shape.experts is not None:
        y = routed(ops, x, norm(x, "pre_feedforward_layernorm_2"), config, shape.experts, label)
        y = norm(y, "post_feedforward_layernorm_2")
        h = ops.add(norm(h, "post_feedforward_layernorm_1"), y)
    h = norm(h, "post_feedforward_layernorm")
    if isinstance(shape.mixer, Heads) and shape.mixer.keys_of is not None:  # transformers ignores them, too
        ops.ignore(*(f"{label}.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")))
    if inputs is None:
        return ops.add_scaled(x, h, factor)
    x = ops.add(x, h)
    h = gated_input(ops, x, inputs, int(label.rpartition(".")[2]), shape.input_width, label)
    return ops.add_scaled(x, norm(h, "post_per_layer_input_norm"), factor)


def routed(ops: Recorder, x: Tensor, h: Tensor, config: ModelConfig, shape: Experts, label: str) -> Tensor:
    """The experts' output for rows h. Their router sees x, divided by its root mean square, times a scale / sqrt(D)."""
    scale = ops.scaled_constant(f"{label}.router.scale", math.sqrt(1 / x.width), x.width)
    seen = ops.rms_norm_by(x, scale, f"{label}.router.norm", config.rms_eps)
    logits = ops.linear(seen, [(f"{label}.router.proj", shape.num_experts)])
    factors = ops.constant(f"{label}.router.per_expert_scale", shape.num_experts)
    return experts(ops, h, shape, label, logits=logits, scale=factors)


TINY: Mapping[str, Any] = {
    **{key: value for key, value in BASE.items() if key not in ("hidden_act", "rope_theta")},
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL] * 2,
    "sliding_window": 40,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": BASE["vocab_size"],
    "final_logit_softcapping": 3.0,
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
GGUF = Architecture(
    "gemma4",
    "gemma4_text",
    "Gemma4ForCausalLM",
    NAMES,
    config_of,
    top_names=TOP_NAMES,
    varying=VARYING,
    rope_factors=proportional,
)
GEMMA4 = Family(model_types=("gemma4_text", "gemma4_unified_text"), read=read, record=record, gguf=GGUF, tiny=TINY)
