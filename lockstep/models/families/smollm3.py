"""SmolLM3: Llama without rope on every fourth layer, which has a sliding window if use_sliding_window; layer_types
wins."""

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
from lockstep.models.families.qwen2 import WINDOW, WINDOW_TYPES
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    others = ["attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *WINDOW]
    check_keys(config, others, free=["mlp_bias"])
    heads = heads_of(config, {"theta": 2e6}, **biases(config))
    turned = Layer(heads, mlp_of(config, bias=flag(config, "mlp_bias")))
    ropes = rope_layers(config)
    layers = [turned if turns else with_heads(turned, rope=None) for turns in ropes]
    slides = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    silent = ["sliding_attention" if slides and not turns else "full_attention" for turns in ropes]
    types = layer_types(config, *WINDOW_TYPES) or silent
    return model_of(config, with_windows(layers, config, types), tied=True)


def rope_layers(config: Config) -> list[bool]:
    """Of each layer, whether its heads turn."""
    interval, count = optional(config, "no_rope_layer_interval", 4), num_layers(config)
    ropes = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(ropes, list) or len(ropes) < count or any(r not in (0, 1) for r in ropes):
        raise ValueError(f"config key 'no_rope_layers': expected {count} of 0 and 1, got {ropes!r}")
    return [bool(r) for r in ropes[:count]]


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """llama.cpp fixes the interval; GGUF does not record it."""
    layers = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    ropes = {"no_rope_layer_interval": 4, "no_rope_layers": layers}
    return config | has_biases(names, "attention_bias", "mlp_bias") | ropes


SMOLLM3 = Family(
    model_types=("smollm3",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("smollm3", "smollm3", "SmolLM3ForCausalLM", DENSE, gguf_config, undo),
)
