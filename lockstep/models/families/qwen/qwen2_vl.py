"""The text part of Qwen2-VL and Qwen2.5-VL: Qwen2. Older configs have its keys beside those of vision.

Ollama names the architecture of Qwen2.5-VL qwen25vl.
In text all parts of a position are equal: M-RoPE is plain rope.
"""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import heads_of, layer, mlp_of, model_of, num_layers
from lockstep.models.families.qwen.qwen2 import WINDOW_KEYS, qwen_windows
from lockstep.models.families.qwen.qwen3_vl import skip_vision
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.rope_config import MROPE
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, WINDOW_KEYS)
    heads = heads_of(config, {"theta": 1000000.0, "ignored": MROPE}, qkv_bias=True)
    layers = [Layer(heads, mlp_of(config))] * num_layers(config)
    return model_of(config, qwen_windows(layers, {"max_window_layers": 80, **config}))


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """The config of its architecture is complete; keys of vision are skipped."""
    skip_vision(keys)
    return config


QWEN2_VL = Family(
    model_types=("qwen2_vl_text", "qwen2_vl", "qwen2_5_vl_text", "qwen2_5_vl"),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture(
        "qwen2vl", "qwen2_vl_text", "Qwen2VLForConditionalGeneration", DENSE, gguf_config, also=("qwen25vl",)
    ),
)
