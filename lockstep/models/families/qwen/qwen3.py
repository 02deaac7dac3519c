"""Qwen3: Llama with a norm on each query and key head; windows as in Qwen2."""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys
from lockstep.models.decoder import decoder
from lockstep.models.families import llama_like
from lockstep.models.families.llama_like import biases, heads_of, mlp_of, model_of, num_layers
from lockstep.models.families.qwen.qwen2 import WINDOW_KEYS, qwen_windows
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.record import Norm, Recorder
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE, HEAD_NORMS


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["attention_bias", *WINDOW_KEYS])
    layers = [Layer(heads_of(config, **biases(config)), mlp_of(config))] * num_layers(config)
    return model_of(config, qwen_windows(layers, config))


def layer(ops: Recorder, x: Tensor, config: ModelConfig, shape: Layer, label: str) -> Tensor:
    """Llama's layer with head norms."""
    return llama_like.layer(ops, x, config, shape, label, head_norms=Norm(config.rms_eps))


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases."""
    return config | has_biases(names, "attention_bias")


QWEN3 = Family(
    model_types=("qwen3",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", {**DENSE, **HEAD_NORMS}, gguf_config),
    tiny={**BASE, "model_type": "qwen3"},
)
