"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layer, where queries, keys and values are one tensor, and gate and up
another. The rope may leave channels out, and may have factors of its own for contexts longer than the trained one.

Long factors hold for all positions if the model's context is longer than that of its first training: the bits of a text
must not depend on how much of it is computed at once. (transformers takes the short ones as long as a text is short;
`--rope short` takes them, for the context that they are for: `rope_config.with_rope`.)

A sliding window, if there is one, is a window of every layer, as in transformers; llama.cpp has none.
"""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys, need, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import (
    feed_forward,
    heads_of,
    mlp_of,
    model_of,
    num_layers,
    pre_norm,
    self_attention,
)
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.record import Norm, Recorder
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys

OLD_NAMES = ("su", "yarn")  # of longrope, in configs of 2024
ONES = ("full_attn_mod", "interpolate_factor")  # keys of Phi-4-mini that transformers does not read
OLD_CONTEXT = "original_max_position_embeddings"

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    ones = [key for key in ONES if config.get(key) == 1]
    check_keys(config, ["sliding_window", *ones], free=["partial_rotary_factor"])
    config = {**config, OLD_CONTEXT: optional(config, OLD_CONTEXT, 4096), **renamed_ropes(config)}
    one = Layer(heads_of(config, {"partial": 1.0}, window=window_of(config)), mlp_of(config))
    return model_of(config, [one] * num_layers(config))


def window_of(config: Config) -> int:
    """The window of all layers; 0, which is none, for a window that no text of the model's context fills."""
    window = optional(config, "sliding_window", 1 << 30)
    return window if window < need(config, "max_position_embeddings") else 0


def renamed_ropes(config: Config) -> Config:
    """The objects that describe the rope, with its present name in place of the old ones."""
    found = {key: config.get(key) for key in ("rope_scaling", "rope_parameters")}
    return {key: {**rope, **renamed_type(rope)} for key, rope in found.items() if isinstance(rope, dict)}


def renamed_type(rope: Config) -> Config:
    """The rope's type, if it has an old name."""
    return {"rope_type": "longrope"} if (rope.get("rope_type") or rope.get("type")) in OLD_NAMES else {}


# ------------------------------------------------------------ the model


def layer(ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str) -> Tensor:
    """Llama's layer with fused projections."""
    return pre_norm(
        ops,
        x,
        label,
        Norm(config.rms_eps),
        mixer=lambda h: self_attention(ops, h, shape.mixer, f"{label}.self_attn", fused=True),
        mlp=lambda h: feed_forward(ops, h, shape.mlp, f"{label}.mlp", fused=True),
    )


# ------------------------------------------------------------ GGUF

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds the window (0: none) and the context of the first training."""
    return config | {
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
        OLD_CONTEXT: keys.integer("rope.scaling.original_context_length", config["max_position_embeddings"]),
    }


PHI3 = Family(
    model_types=("phi3",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("phi3", "phi3", "Phi3ForCausalLM", NAMES, gguf_config),
)
