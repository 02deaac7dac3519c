"""Gemma 4 in GGUF files: names, and the keys that make its config.json."""

from collections.abc import Mapping

import numpy as np

from lockstep.models.families.gemma.gemma3 import SANDWICH_NAMES, gguf_base
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.names import HEAD_NORMS
from lockstep.weights.tensor import TensorInfo

STILL = 1e29  # factors from here on divide a pair's frequency so that it stands still
NAMES = {
    **SANDWICH_NAMES,
    **HEAD_NORMS,
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_gate_exps": "experts.{expert}.gate_proj",
    "ffn_up_exps": "experts.{expert}.up_proj",
    "ffn_down_exps": "experts.{expert}.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}
VARYING = frozenset(("attention.head_count_kv", "feed_forward_length"))  # keys that may differ between layers
TOP_NAMES = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}


def config_of(config: dict, keys: Keys, tensors: Mapping[str, TensorInfo]) -> dict:
    """Adds what differs between layers. Of the common keys head_dim is that of layers that see all keys."""
    num_layers, head_dim = config["num_hidden_layers"], keys.integer("attention.key_length_swa")
    slides = keys.values("attention.sliding_window_pattern") or []
    shared = keys.integer("attention.shared_kv_layers", 0)
    kv_heads = keys.per_layer("attention.head_count_kv", num_layers)
    widths = keys.per_layer("feed_forward_length", num_layers)
    if keys.integer("attention.value_length_swa", head_dim) != head_dim:
        raise ValueError("value heads of another size than key heads are not supported")
    full = [i for i, slides_here in enumerate(slides) if not slides_here]
    others = {k: v for k, v in gguf_base(config, 0).items() if k not in DROPPED}
    return others | {
        "layer_types": ["sliding_attention" if slides_here else "full_attention" for slides_here in slides],
        "sliding_window": keys.integer("attention.sliding_window"),
        "head_dim": head_dim,
        "per_layer_config": {
            str(i): {"head_dim": config["head_dim"], "num_key_value_heads": kv_heads[i]} for i in full if i < num_layers
        },
        "attention_k_eq_v": not all(
            has_values(tensors, i, config["num_attention_heads"] + kv_heads[i], config["head_dim"])
            for i in full
            if i < num_layers - shared
        ),
        "num_kv_shared_layers": shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": double_wide(widths, shared),
        "hidden_size_per_layer_input": keys.integer("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "rope_parameters": ropes(config, keys, head_dim),
        **experts(keys),
    }


def experts(keys: Keys) -> dict:
    """The keys of experts, if there are any."""
    num_experts = keys.integer("expert_count", 0)
    return {
        "enable_moe_block": num_experts > 0,
        "num_experts": num_experts,
        "top_k_experts": keys.integer("expert_used_count", 0),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", 0),
    }


def has_values(tensors: Mapping[str, TensorInfo], layer: int, others: int, head_dim: int) -> bool:
    """Whether a layer has a projection of values, alone or below those of its `others` heads of queries and keys."""
    fused = tensors.get(f"blk.{layer}.attn_qkv.weight")
    return f"blk.{layer}.attn_v.weight" in tensors or (fused is not None and fused.shape[0] > others * head_dim)


DROPPED = ("query_pre_attn_scalar", "rope_theta", "rope_scaling", "partial_rotary_factor")


def double_wide(widths: list[int], shared: int) -> bool:
    """Whether the last `shared` layers have MLPs of twice the width. ValueError for any other widths."""
    own, wide = widths[: len(widths) - shared], widths[len(widths) - shared :]
    is_double = bool(wide) and wide[0] == 2 * widths[0]
    if {*own} - {widths[0]} or {*wide} - {widths[0] * (2 if is_double else 1)}:
        raise ValueError(f"feed_forward_length {widths}: expected one width, and twice as much in shared layers")
    return is_double


def ropes(config: dict, keys: Keys, head_dim: int) -> dict:
    """rope_parameters of config.json."""
    if keys.integer("rope.dimension_count_swa", head_dim) != head_dim:
        raise ValueError("rope.dimension_count_swa: only attention.key_length_swa is supported")
    full = {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {"rope_type": "default"})}
    theta = keys.number("rope.freq_base_swa", 10000.0)
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}


def proportional(factors: np.ndarray, rope_dim: int, where: str) -> dict:
    """The rope whose first pairs turn. factors: by which frequencies are divided: ones, then huge ones."""
    turning = int((factors == 1).sum())
    if (
        len(factors) != rope_dim // 2
        or not turning
        or (factors[:turning] != 1).any()
        or (factors[turning:] < STILL).any()
    ):
        raise ValueError(f"{where}: tensor 'rope_freqs.weight': expected {rope_dim // 2} factors, ones and then 1e30")
    return {"rope_type": "proportional", "partial_rotary_factor": 2 * turning / rope_dim}
