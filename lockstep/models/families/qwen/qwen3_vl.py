"""The text part of Qwen3-VL: Qwen3 without windows. In text all parts of a position are equal: M-RoPE is plain rope."""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import biases, heads_of, mlp_of, model_of, num_layers
from lockstep.models.families.qwen.qwen3 import layer
from lockstep.models.family import Family
from lockstep.models.model_config import Heads, Layer, ModelConfig
from lockstep.models.rope_config import MROPE
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE, HEAD_NORMS


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["attention_bias"])
    return model_of(config, [Layer(vision_heads(config), mlp_of(config))] * num_layers(config))


def vision_heads(config: Config) -> Heads:
    """The attention heads of a layer."""
    return heads_of(config, {"theta": 500000.0, "ignored": MROPE}, **biases(config))


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases. Sections of positions and layers that images reach do not matter to text."""
    skip_vision(keys)
    return config | has_biases(names, "attention_bias")


def skip_vision(keys: Keys) -> None:
    """Reads the keys that only matter to images."""
    keys.values("rope.dimension_sections")
    keys.integer("n_deepstack_layers", 0)


NAMES = {**DENSE, **HEAD_NORMS}
QWEN3_VL = Family(
    model_types=("qwen3_vl_text", "qwen3_vl"),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("qwen3vl", "qwen3_vl_text", "Qwen3VLForConditionalGeneration", NAMES, gguf_config),
)
