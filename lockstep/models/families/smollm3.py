"""SmolLM3: Llama without rope on every fourth layer. If use_sliding_window these layers have a sliding window, unless
layer_types names others."""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys, flag, layer_types, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama import undo
from lockstep.models.families.llama_like import (
    biases,
    heads_of,
    layer,
    mlp_of,
    model_of,
    num_layers,
    with_heads,
    with_windows,
)
from lockstep.models.families.qwen.qwen2 import WINDOW_KEYS, WINDOW_TYPES
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    keys = ["attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *WINDOW_KEYS]
    check_keys(config, keys, free=["mlp_bias"])
    heads = heads_of(config, {"theta": 2e6}, **biases(config))
    with_rope = Layer(heads, mlp_of(config, bias=flag(config, "mlp_bias")))
    have_rope = rope_layers(config)
    layers = [with_rope if has_rope else with_heads(with_rope, rope=None) for has_rope in have_rope]
    slides = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    usual_types = ["sliding_attention" if slides and not has_rope else "full_attention" for has_rope in have_rope]
    types = layer_types(config, *WINDOW_TYPES) or usual_types
    return model_of(config, with_windows(layers, config, types), tied=True)


def rope_layers(config: Config) -> list[bool]:
    """For each layer, whether it has a rope."""
    interval, depth = optional(config, "no_rope_layer_interval", 4), num_layers(config)
    flags = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(depth)]
    if not isinstance(flags, list) or len(flags) < depth or any(value not in (0, 1) for value in flags):
        raise ValueError(f"config key 'no_rope_layers': expected {depth} of 0 and 1, got {flags!r}")
    return [bool(value) for value in flags[:depth]]


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases, and the layers with a rope: GGUF does not record them, llama.cpp hard-codes the interval."""
    layers = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    ropes = {"no_rope_layer_interval": 4, "no_rope_layers": layers}
    return config | has_biases(names, "attention_bias", "mlp_bias") | ropes


SMOLLM3 = Family(
    model_types=("smollm3",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", DENSE, gguf_config, undo),
)
