"""The text part of Qwen3-VL-MoE: Qwen3-VL with experts, which checkpoints have stacked and transposed."""

from collections.abc import Container
from dataclasses import replace
from functools import partial

from lockstep.models.config import Config, check_keys
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import model_of, num_layers
from lockstep.models.families.qwen import qwen3_moe
from lockstep.models.families.qwen.qwen3 import layer
from lockstep.models.families.qwen.qwen3_moe import EXPERT_KEYS, experts_of, with_dense_layers
from lockstep.models.families.qwen.qwen3_vl import skip_vision, vision_heads
from lockstep.models.family import Family
from lockstep.models.model_config import Layer, ModelConfig
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys


def read(config: Config) -> ModelConfig:
    """The ModelConfig. Like transformers, it does not read norm_topk_prob: expert weights always sum to 1."""
    check_keys(config, ["attention_bias", *EXPERT_KEYS], free=["decoder_sparse_step", "mlp_only_layers"])
    experts = replace(experts_of({**config, "norm_topk_prob": True}), transposed=True)
    layers = [Layer(vision_heads(config), experts)] * num_layers(config)
    return model_of(config, with_dense_layers(layers, config), tied=True)


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases and experts."""
    skip_vision(keys)
    if keys.integer("expert_shared_feed_forward_length", 0):
        raise ValueError("expert_shared_feed_forward_length is not 0: an expert that all tokens share is not supported")
    return qwen3_moe.gguf_config(config, keys, names)


# Gate and up of all experts in one tensor would not be transposed, which its shape need not tell.
NAMES = {name: hf for name, hf in qwen3_moe.NAMES.items() if "gate_up" not in name}
QWEN3_VL_MOE = Family(
    model_types=("qwen3_vl_moe_text", "qwen3_vl_moe"),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("qwen3vlmoe", "qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration", NAMES, gguf_config),
)
