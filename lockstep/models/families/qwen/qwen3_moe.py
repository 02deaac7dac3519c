"""Qwen3-MoE: Qwen3 with experts in place of most MLPs; every layer has a sliding window if use_sliding_window."""

from collections.abc import Container, Sequence
from dataclasses import replace
from functools import partial

from lockstep.models.config import Config, check_keys, flag, need, optional
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import biases, heads_of, mlp_of, model_of, num_layers, with_windows
from lockstep.models.families.qwen.qwen2 import WINDOW_KEYS
from lockstep.models.families.qwen.qwen3 import layer
from lockstep.models.family import Family
from lockstep.models.model_config import Experts, Layer, ModelConfig
from lockstep.models.tiny import BASE
from lockstep.weights.gguf.architecture import Architecture, has_biases
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import ATTENTION, EXPERTS, HEAD_NORMS

EXPERT_KEYS = """num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob
decoder_sparse_step mlp_only_layers""".split()


def read(config: Config) -> ModelConfig:
    """The ModelConfig."""
    check_keys(config, ["attention_bias", *WINDOW_KEYS, *EXPERT_KEYS], free=["decoder_sparse_step", "mlp_only_layers"])
    one = Layer(heads_of(config, **biases(config)), experts_of(config))
    layers = with_dense_layers([one] * num_layers(config), config)
    config = {"sliding_window": 4096, **config}
    slides = flag(config, "use_sliding_window") and config["sliding_window"] is not None
    types = ["sliding_attention" if slides else "full_attention"] * len(layers)
    return model_of(config, with_windows(layers, config, types))


def experts_of(config: Config) -> Experts:
    """The shape of the experts."""
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    experts = Experts(
        need(config, key, high=4096),
        need(config, "num_experts_per_tok", high=256),
        need(config, "moe_intermediate_size"),
        flag(config, "norm_topk_prob"),
    )
    if experts.num_per_token > experts.num_experts:
        raise ValueError(
            f"config key 'num_experts_per_tok': expected at most {experts.num_experts}, got {experts.num_per_token}"
        )
    return experts


def with_dense_layers(layers: Sequence[Layer], config: Config) -> list[Layer]:
    """Layers with a plain MLP in mlp_only_layers, and in all but every decoder_sparse_step-th layer."""
    step, listed = optional(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(i) is int and 0 <= i < len(layers) for i in listed):
        raise ValueError(f"config key 'mlp_only_layers': expected layers below {len(layers)}, got {listed!r}")
    is_dense = [i in listed or (i + 1) % step != 0 for i in range(len(layers))]
    return [replace(layer, mlp=mlp_of(config)) if d else layer for layer, d in zip(layers, is_dense, strict=True)]


def gguf_config(config: dict, keys: Keys, names: Container[str]) -> dict:
    """Adds biases and experts. Only Ollama's files have norm_top_k_prob: llama.cpp always renormalises."""
    return config | {
        **has_biases(names, "attention_bias"),
        "num_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", config["intermediate_size"]),
        "norm_topk_prob": keys.flag("norm_top_k_prob", True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


NAMES = {**ATTENTION, **HEAD_NORMS, **EXPERTS, "ffn_norm": "post_attention_layernorm"}
QWEN3_MOE = Family(
    model_types=("qwen3_moe",),
    read=read,
    record=partial(decoder, layer=layer),
    gguf=Architecture("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", NAMES, gguf_config),
    tiny={
        **BASE,
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
)
