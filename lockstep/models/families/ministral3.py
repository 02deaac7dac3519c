"""Ministral 3, and Mistral Small in files of its GGUF architecture: Llama with a yarn rope, whose rotated queries grow
with their position. Small has neither: it is a Mistral model.

The text part of Mistral's vision-language models (`mistral3`) is one of the two.
"""

from collections.abc import Container
from functools import partial

from lockstep.models.config import Config, check_keys, need
from lockstep.models.decoder import decoder
from lockstep.models.families.llama import undo
from lockstep.models.families.llama_like import heads_of, layer, mlp_of, model_of, num_layers
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.models.rope_config import BETA, OLD_CONTEXT, growth
from lockstep.models.tiny import BASE, CONTEXT
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import DENSE

# of rope_parameters: keys that say nothing about the rope
OTHERS = frozenset((BETA, "max_position_embeddings"))
ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, OLD_CONTEXT: 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, BETA: 0.1,
}  # fmt: skip


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["sliding_window"])
    config = {"head_dim": 128, **config}
    if config.get("rope_parameters") is None:
        config["rope_parameters"] = ROPE
    window = 0 if config.get("sliding_window") is None else need(config, "sliding_window")
    heads = heads_of(config, {"ignored": OTHERS}, growth=growth(config), window=window)
    return model_of(config, [Layer(heads, mlp_of(config))] * num_layers(config))


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds how queries grow, and the factor of yarn's tables; a file without these is a Mistral model."""
    if "attention.temperature_scale" not in keys:
        return config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    rope = {**(config.pop("rope_scaling") or {}), "rope_theta": config.pop("rope_theta")}
    rope[BETA] = keys.number("attention.temperature_scale")
    if weight := keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        rope |= {"mscale": 1.0, "mscale_all_dim": weight}
    return config | {"rope_parameters": rope}


MINISTRAL3 = Family(
    model_types=("ministral3",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("mistral3", "ministral3", "Ministral3ForCausalLM", DENSE, gguf_config, undo),
    tiny={
        **{key: value for key, value in BASE.items() if key != "rope_theta"},
        "model_type": "ministral3",
        "rope_parameters": {**ROPE, "rope_theta": 500.0, "factor": 4.0, OLD_CONTEXT: CONTEXT // 4, BETA: 0.3},
    },
)
