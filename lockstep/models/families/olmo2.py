"""OLMo 2 and 3: norms after attention and after the MLP only, and a norm over all query heads at once, and one over all
key heads. In OLMo 3, three of four layers have a sliding window and a plain rope; the others may have a scaled one.

rope_theta of old configs holds for all layers, as in llama.cpp; transformers 5 forgets it for layers with a window,
which changes no published model.
"""

from collections.abc import Container, Sequence
from functools import partial

from lockstep.models.config import Config, check_keys, layer_types, need, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import (
    biases,
    feed_forward,
    head_dim_of,
    heads_of,
    mlp_of,
    model_of,
    num_layers,
    self_attention,
    with_heads,
    with_windows,
)
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig, Rope
from lockstep.models.record import Norm, Recorder
from lockstep.models.rope_config import ropes_by_type
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION, HEAD_NORMS, MLP

THETA = 5e5  # default of OLMo 3
FULL, SLIDING = "full_attention", "sliding_attention"
ROPES = ("rope_theta", "rope_scaling", "rope_parameters")

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    windows = ["sliding_window", "layer_types"] if config["model_type"] == "olmo3" else []
    check_keys(config, ["attention_bias", *windows])
    return model_of(config, windowed_layers(config) if windows else [one_layer(config)] * num_layers(config))


def one_layer(config: Config) -> Layer:
    """A layer that sees all keys."""
    return Layer(heads_of(config, **biases(config)), mlp_of(config))


def windowed_layers(config: Config) -> list[Layer]:
    """The layers of OLMo 3."""
    types = layer_types(config, FULL, SLIDING) or [SLIDING if (i + 1) % 4 else FULL for i in range(num_layers(config))]
    one = one_layer({key: value for key, value in config.items() if key not in ROPES})
    ropes = ropes_of(config)
    layers = [with_heads(one, rope=ropes[layer_type]) for layer_type in types]
    return with_windows(layers, {**config, "sliding_window": optional(config, "sliding_window", 4096)}, types)


def ropes_of(config: Config) -> dict[str, Rope]:
    """The rope of each type of layer."""
    head_dim = head_dim_of(config, need(config, "num_attention_heads"))
    config = {**config, "rope_local_base_freq": config.get("rope_theta")}
    return ropes_by_type(config, head_dim, {FULL: THETA, SLIDING: THETA})


# ------------------------------------------------------------ the model


def layer(ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str) -> Tensor:
    """x += norm(attention(x)); x += norm(mlp(x))."""
    norm = Norm(config.rms_eps)
    h = self_attention(ops, x, shape.mixer, f"{label}.self_attn", head_norms=norm, whole_norms=True)
    x = ops.add(x, ops.rms_norm(h, f"{label}.post_attention_layernorm.weight", *norm))
    h = feed_forward(ops, x, shape.mlp, f"{label}.mlp")
    return ops.add(x, ops.rms_norm(h, f"{label}.post_feedforward_layernorm.weight", *norm))


# ------------------------------------------------------------ GGUF

NAMES = {
    **{name: hf for name, hf in ATTENTION.items() if name != "attn_norm"},
    **HEAD_NORMS,
    **MLP,
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases. A file with a sliding window is an OLMo 3 model: conversion writes both as OLMo 2."""
    config |= has_biases(names, "attention_bias")
    if "attention.sliding_window" not in keys:
        return config
    types = keys.values("attention.sliding_window_pattern")
    return config | {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": None if types is None else layer_names(types),
    }


def layer_names(slides: Sequence[object]) -> list[str]:
    """The type of each layer, given whether it has a window."""
    return [SLIDING if each else FULL for each in slides]


OLMO2 = Family(
    model_types=("olmo2", "olmo3"),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("olmo2", "olmo2", "Olmo2ForCausalLM", NAMES, gguf_config),
    tiny={**BASE, "model_type": "olmo2"},
)
