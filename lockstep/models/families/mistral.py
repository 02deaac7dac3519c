"""Mistral: Llama with a sliding window on every layer or on none. Its GGUF files name Llama's architecture."""

from functools import partial

from lockstep.models.config import Config, check_keys
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import heads_of, layer, mlp_of, model_of, num_layers, with_windows
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["sliding_window"])
    config = {"sliding_window": 4096, **config}
    layer_type = "full_attention" if config["sliding_window"] is None else "sliding_attention"
    layers = [Layer(heads_of(config), mlp_of(config))] * num_layers(config)
    return model_of(config, with_windows(layers, config, [layer_type] * len(layers)))


MISTRAL = Family(model_types=("mistral",), read=read, record=partial(decoder, layer=layer))
