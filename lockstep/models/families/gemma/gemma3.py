"""Gemma 3, text only: norms before and after attention and the MLP, a gated MLP with GELU. For each layer that sees all
keys there are five with a sliding window, which have another rope.

The embedding is multiplied by the square root of the hidden size as float32, whatever the type of the weights, as in
llama.cpp; transformers rounds the root to that type (25.25 in place of 25.298 for the smallest model in bf16).
"""

import math
from collections.abc import Container, Mapping

from lockstep.models.config import Config, check_keys, layer_types, need, need_float, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import (
    feed_forward,
    mlp_of,
    model_of,
    num_layers,
    self_attention,
    with_windows,
)
from lockstep.models.family import Family
from lockstep.models.model_config import Heads, Layer, ModelConfig, checked_head_dim
from lockstep.models.record import Norm, Recorder
from lockstep.models.rope_config import ropes_by_type
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION, HEAD_NORMS, MLP
from lockstep.weights.gguf.undo import MinusOne, Undo

OFFSET = 1.0  # of every norm
THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}  # defaults of rope_theta by layer type
DEFAULTS = dict(
    vocab_size=262_208, num_attention_heads=8, num_key_value_heads=4, head_dim=256, rms_norm_eps=1e-6,
    max_position_embeddings=131_072, query_pre_attn_scalar=256, sliding_window=4096,
    hidden_activation="gelu_pytorch_tanh",
)  # fmt: skip
KEYS = """hidden_activation query_pre_attn_scalar sliding_window sliding_window_pattern _sliding_window_pattern
layer_types rope_local_base_freq""".split()

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig; keys that a text_config leaves out have the values of `DEFAULTS`.

    The MLP's activation is hidden_activation; hidden_act is ignored, as in transformers.
    """
    check_keys(config, KEYS, free=["hidden_act"])
    config = completed(config, DEFAULTS)
    interval = optional(config, "sliding_window_pattern", optional(config, "_sliding_window_pattern", 6))
    types = layer_types(config, *THETAS) or [
        "sliding_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers(config))
    ]
    mlp = mlp_of(config, activation="gelu_tanh")
    layers = {layer_type: Layer(heads, mlp) for layer_type, heads in heads_by_type(config).items()}
    return model_of(config, with_windows([layers[layer_type] for layer_type in types], config, types), tied=True)


def completed(config: Config, defaults: Config) -> Config:
    """The config with defaults for the keys that it leaves out. ValueError for an activation other than GELU."""
    config = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    if (activation := config["hidden_activation"]) != "gelu_pytorch_tanh":
        raise ValueError(f"config key 'hidden_activation': {activation!r} is not supported, only 'gelu_pytorch_tanh'")
    return config


def heads_by_type(config: Config) -> dict[str, Heads]:
    """The heads of a layer of each type, still without their windows."""
    head_dim = checked_head_dim(need(config, "head_dim"))
    scale = scale_of(config)
    num_heads = need(config, "num_attention_heads"), need(config, "num_key_value_heads")
    ropes = ropes_by_type(config, head_dim, THETAS)
    return {layer_type: Heads(*num_heads, head_dim, scale, rope) for layer_type, rope in ropes.items()}


def scale_of(config: Config) -> float:
    """The factor of scores."""
    return math.sqrt(1 / need_float(config, "query_pre_attn_scalar", 1e-3, 1e6))


# ------------------------------------------------------------ the model


def layer(
    ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str, has_head_norms: bool = True
) -> Tensor:
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x))). has_head_norms: whether heads are normed, too."""
    eps = config.rms_eps

    def norm(h: Tensor, name: str) -> Tensor:
        return ops.rms_norm(h, f"{label}.{name}_layernorm.weight", eps, OFFSET)

    h = norm(x, "input")
    head_norms = Norm(eps, OFFSET) if has_head_norms else None
    h = self_attention(ops, h, shape.mixer, f"{label}.self_attn", head_norms=head_norms)
    x = ops.add(x, norm(h, "post_attention"))
    h = feed_forward(ops, norm(x, "pre_feedforward"), shape.mlp, f"{label}.mlp")
    return ops.add(x, norm(h, "post_feedforward"))


def record(ops: Recorder, config: ModelConfig) -> Tensor:
    """Records the model; returns its logits."""
    return decoder(ops, config, layer, norm_offset=OFFSET, embed_scale=embed_scale(config))


def embed_scale(config: ModelConfig) -> float:
    """The factor of the embedding."""
    return math.sqrt(config.hidden_size)


# ------------------------------------------------------------ GGUF

SANDWICH_NAMES = {
    **ATTENTION,
    **MLP,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NAMES = {**SANDWICH_NAMES, **HEAD_NORMS}


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds what llama.cpp hard-codes: the scale of scores, and the window pattern that holds if the file names none."""
    return gguf_base(config, num_largest=62) | {
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "sliding_window": keys.integer("attention.sliding_window"),
        **gguf_layers(keys),
    }


def gguf_base(config: dict, num_largest: int) -> dict:
    """The config with the activation, and the scale of scores as llama.cpp knows it by heart. num_largest: layers of
    the model with 27 billion weights, whose scale is another."""
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == num_largest:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    others = {key: value for key, value in config.items() if key != "hidden_act"}
    return others | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def gguf_layers(keys: Keys) -> dict:
    """Which layers have a window: all but every n-th, or an array with a flag for each layer."""
    name = "attention.sliding_window_pattern"
    if not keys.is_array(name):
        return {"sliding_window_pattern": keys.integer(name, 6)}
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in keys.values(name) or ()]}


def undo(name: str, config: Mapping) -> Undo:
    """Conversion stored norm weights as 1 + w."""
    return MinusOne() if name.endswith("norm.weight") else Undo()


GEMMA3 = Family(
    model_types=("gemma3_text",),
    read=read,
    record=record,
    gguf=Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", NAMES, gguf_config, undo),
    tiny={
        **{key: value for key, value in BASE.items() if key != "hidden_act"},
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "query_pre_attn_scalar": 24,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
