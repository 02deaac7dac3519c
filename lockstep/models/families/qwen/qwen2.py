"""Qwen2 and Qwen2.5: Llama with biases on q, k and v; some layers have a sliding window if use_sliding_window."""

from collections.abc import Sequence
from functools import partial

from lockstep.models.config import Config, check_keys, flag, layer_types, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import heads_of, layer, mlp_of, model_of, num_layers, with_windows
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.tiny import BASE
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.names import DENSE

WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
WINDOW_TYPES = ("full_attention", "sliding_attention")


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, WINDOW_KEYS)
    layers = [Layer(heads_of(config, qkv_bias=True), mlp_of(config))] * num_layers(config)
    return model_of(config, qwen_windows(layers, config))


def qwen_windows(layers: Sequence[Layer], config: Config) -> list[Layer]:
    """The layers with their windows: if use_sliding_window, layers from max_window_layers on (or those that layer_types
    names) have one."""
    config = {"sliding_window": 4096, **config}
    slides = flag(config, "use_sliding_window") and config["sliding_window"] is not None
    first = optional(config, "max_window_layers", 28, low=0)
    types = layer_types(config, *WINDOW_TYPES) or [
        "sliding_attention" if slides and i >= first else "full_attention" for i in range(len(layers))
    ]
    if "sliding_attention" in types and not slides:
        raise ValueError("config key 'layer_types': sliding_attention needs use_sliding_window and a sliding_window")
    return with_windows(layers, config, types)


QWEN2 = Family(
    model_types=("qwen2",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", DENSE),
    tiny={**BASE, "model_type": "qwen2"},
)
