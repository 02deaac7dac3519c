"""Qwen3.5-MoE (Qwen3.5 and Qwen3.6 35B-A3B): Qwen3.5 with experts in place of MLPs, one of which all tokens share."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lockstep.models.config import Config, check_keys, need
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import model_of
from lockstep.models.families.qwen import qwen3_5
from lockstep.models.families.qwen.qwen3_5 import MTP_NAMES, OFFSET, layer, layers_of, undo
from lockstep.models.families.qwen.qwen3_moe import experts_of
from lockstep.models.family import Family
from lockstep.models.model_config import Experts, ModelConfig
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import EXPERTS, SHARED_EXPERT
from lockstep.weights.tensor import TensorInfo

EXPERT_KEYS = "num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size".split()


def read(config: Config) -> ModelConfig:
    """The ModelConfig. Like transformers, it does not read norm_topk_prob: expert weights always sum to 1."""
    check_keys(config, [*qwen3_5.KEYS, *EXPERT_KEYS, "norm_topk_prob"], free=["partial_rotary_factor"])
    layers, mtp_layers = layers_of(config, with_shared_expert({**config, "norm_topk_prob": True}))
    return model_of(config, layers, mtp_layers=mtp_layers)


def with_shared_expert(config: Config) -> Experts:
    """The shape of the experts, and of the one that all tokens share."""
    return replace(experts_of(config), shared_width=need(config, "shared_expert_intermediate_size"))


NAMES = {**qwen3_5.NAMES, **EXPERTS, **SHARED_EXPERT}


def gguf_config(config: dict, keys: Keys, infos: Mapping[str, TensorInfo]) -> dict:
    """Adds the numbers of the experts to those of Qwen3.5."""
    return qwen3_5.gguf_config(config, keys, infos) | gguf_experts(keys)


def gguf_experts(keys: Keys) -> dict:
    """The numbers of the experts. Only Ollama's files have norm_top_k_prob: llama.cpp always renormalises."""
    if keys.integer("expert_shared_count", 1) != 1:
        raise ValueError("expert_shared_count is not 1: experts that all tokens share are supported one by one only")
    return {
        "norm_topk_prob": keys.flag("norm_top_k_prob", True),
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "shared_expert_intermediate_size": keys.integer("expert_shared_feed_forward_length"),
    }


QWEN3_5_MOE = Family(
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    read=read,
    record=partial(decoder, layer=layer, norm_offset=OFFSET),
    gguf=Architecture("qwen35moe", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", NAMES, gguf_config, undo, MTP_NAMES),
    tiny={
        **(qwen3_5.QWEN3_5.tiny or {}),
        "model_type": "qwen3_5_moe_text",
        "layer_types": ["full_attention"],
        "num_hidden_layers": 1,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
)
