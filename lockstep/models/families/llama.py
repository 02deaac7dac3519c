"""Llama 1 to 3: norm, attention, norm, SwiGLU. All attention projections have biases if attention_bias, those of the
MLP if mlp_bias."""

from collections.abc import Container, Mapping
from functools import partial

from lockstep.models.config import Config, check_keys, flag
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import biases, heads_of, layer, mlp_of, model_of, num_layers
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.tiny import BASE
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE
from lockstep.weights.gguf.undo import HalfSplitRows, Undo


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["attention_bias", "mlp_bias"], free=["mlp_bias"])
    one = Layer(heads_of(config, **biases(config)), mlp_of(config, bias=flag(config, "mlp_bias")))
    return model_of(config, [one] * num_layers(config))


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases. A file with a sliding window is a Mistral model: conversion writes both as Llama."""
    config |= has_biases(names, "attention_bias", "mlp_bias")
    if "attention.sliding_window" in keys:
        window = keys.integer("attention.sliding_window")
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return config


def undo(name: str, config: Mapping) -> Undo:
    """Conversion put the two rows of each rotary pair next to each other."""
    if ".q_proj." in name:
        return HalfSplitRows(config["num_attention_heads"])
    if ".k_proj." in name:
        return HalfSplitRows(config["num_key_value_heads"])
    return Undo()


LLAMA = Family(
    model_types=("llama",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("llama", "llama", "LlamaForCausalLM", DENSE, gguf_config, undo),
    tiny={**BASE, "model_type": "llama"},
)
