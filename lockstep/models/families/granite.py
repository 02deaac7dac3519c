"""Granite 3: Llama with four multipliers: of the embedding, of scores (in place of 1 / sqrt(head_dim)), of what each
half of a layer adds, and what logits are divided by. Attention projections and the MLP may have biases."""

from collections.abc import Container
from typing import Any

from lockstep.models.config import Config, check_keys, flag, optional_float
from lockstep.models.decoder import decoder
from lockstep.models.families.llama import undo
from lockstep.models.families.llama_like import biases, heads_of, layer, mlp_of, model_of, num_layers, with_heads
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.record import Recorder
from lockstep.models.tiny import BASE
from lockstep.runtime.program import Tensor
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE

OF_MODEL = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
MULTIPLIERS = (*OF_MODEL, "attention_multiplier")
RANGE = 1e-6, 1e6  # of multipliers

# ------------------------------------------------------------ config.json


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["attention_bias", "mlp_bias", *MULTIPLIERS], free=["mlp_bias"])
    one = Layer(heads_of(config, **biases(config)), mlp_of(config, bias=flag(config, "mlp_bias")))
    return scaled_model(config, one)


def scaled_model(config: Config, one: Layer) -> ModelConfig:
    """The ModelConfig of equal layers with the multipliers; one that is absent is 1."""
    own: dict[str, Any] = {key: optional_float(config, key, 1.0, *RANGE) for key in MULTIPLIERS}
    one = with_heads(one, scale=own.pop("attention_multiplier"))
    return model_of(config, [one] * num_layers(config), **own)


# ------------------------------------------------------------ the model


def record(ops: Recorder, config: ModelConfig) -> Tensor:
    """Records the model; returns its logits."""
    return decoder(ops, config, layer, embed_scale=config.embedding_multiplier)


# ------------------------------------------------------------ GGUF

KEYS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def multipliers(keys: Keys) -> dict[str, float]:
    """The multipliers of config.json. ValueError for a file of a model without a rope."""
    if not keys.flag("rope.scaling.finetuned", True):
        raise ValueError("granite.rope.scaling.finetuned is false: Granite without a rope is not supported")
    return {name: keys.number(key, 1.0) for key, name in KEYS.items()}


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases and multipliers."""
    return config | has_biases(names, "attention_bias", "mlp_bias") | multipliers(keys)


GRANITE = Family(
    model_types=("granite",),
    read=read,
    record=record,
    gguf=Architecture("granite", "granite", "GraniteForCausalLM", DENSE, gguf_config, undo),
    tiny={
        **BASE,
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 0.7,
    },
)
