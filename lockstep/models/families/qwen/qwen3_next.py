"""Qwen3-Next (and Qwen3-Coder-Next): Qwen3.5-MoE with the delta rule's projections in two tensors, by key head.

in_proj_qkvz: of each key head its query rows, its key rows, its values' and their gates'; in_proj_ba: of each key head
b and a of its values. GGUF files have queries, keys and values in one tensor and the gates in another, or, older ones,
in_proj_qkvz as it is; all have in_proj_ba as it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from lockstep.models.config import Config, check_keys, flag
from lockstep.models.decoder import decoder
from lockstep.models.families.llama_like import model_of
from lockstep.models.families.qwen import qwen3_5, qwen3_5_moe
from lockstep.models.families.qwen.qwen3_5 import MTP_NAMES, OFFSET, layers_of
from lockstep.models.families.qwen.qwen3_5_moe import gguf_experts, with_shared_expert
from lockstep.models.families.qwen.qwen3_moe import with_dense_layers
from lockstep.models.family import Family
from lockstep.models.model_config import LinearAttention, ModelConfig
from lockstep.models.record import Recorder
from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.undo import Undo, ValueHeads
from lockstep.weights.rearranged import gathered
from lockstep.weights.tensor import StoredTensor, TensorInfo

KEYS = [*qwen3_5.KEYS, *qwen3_5_moe.EXPERT_KEYS, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"]
FREE = ["partial_rotary_factor", "decoder_sparse_step", "mlp_only_layers"]


def read(config: Config) -> ModelConfig:
    """The ModelConfig. Published configs do not name the MTP head, which their checkpoints have."""
    check_keys(config, KEYS, free=FREE)
    experts = replace(with_shared_expert(config), renormalise=flag(config, "norm_topk_prob", True))
    layers, mtp_layers = layers_of(config, experts, mtp_layers=1)
    return model_of(config, with_dense_layers(layers, config), mtp_layers=mtp_layers)


# ------------------------------------------------------------ projections


def by_key_head(ops: Recorder, shape: LinearAttention, label: str, width: int) -> list[StoredTensor]:
    """The four projections of the delta rule, from tensors whose rows are grouped by key head."""
    G, H, per_key = shape.num_k_heads, shape.num_v_heads, shape.num_v_heads // shape.num_k_heads
    K, V = shape.k_head_dim, per_key * shape.v_head_dim
    ba = ops.stored(f"{label}.in_proj_ba.weight", 2 * H, width)
    b, a = columns_of(np.arange(2 * H).reshape(G, -1), per_key, per_key)
    gates = [gathered(ba, f"{label}.in_proj_{n}.weight", rows) for n, rows in (("b", b), ("a", a))]
    if f"{label}.in_proj_qkv.weight" in ops.tensors:
        rows = (("qkv", shape.conv_channels), ("z", shape.v_width))
        return [*(ops.stored(f"{label}.in_proj_{n}.weight", count, width) for n, count in rows), *gates]
    num_rows = shape.conv_channels + shape.v_width
    whole = ops.stored(f"{label}.in_proj_qkvz.weight", num_rows, width)
    q, k, v, z = columns_of(np.arange(num_rows).reshape(G, -1), K, K, V, V)
    orders = (("qkv", np.concatenate([q, k, v])), ("z", z))
    return [*(gathered(whole, f"{label}.in_proj_{n}.weight", order) for n, order in orders), *gates]


def columns_of(rows: np.ndarray, *widths: int) -> list[np.ndarray]:
    """Runs of columns of these widths, each read row by row."""
    return [part.ravel() for part in np.split(rows, np.cumsum(widths)[:-1], axis=1)]


# ------------------------------------------------------------ GGUF

NAMES = {**qwen3_5_moe.NAMES, "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba"}


def gguf_config(config: dict, keys: Keys, infos: Mapping[str, TensorInfo]) -> dict:
    """Adds the numbers of the delta rule and of the experts, which all layers have."""
    made = qwen3_5.gguf_config(config, keys, infos, reordered=False) | gguf_experts(keys)
    return made | {"decoder_sparse_step": 1, "mlp_only_layers": []}


def undo(name: str, config: Mapping) -> Undo:
    """As in Qwen3.5, but conversion left value heads in their order."""
    return qwen3_5.undo_of(name, ValueHeads(1, 1), 0)


QWEN3_NEXT = Family(
    model_types=("qwen3_next",),
    read=read,
    record=partial(decoder, layer=partial(qwen3_5.layer, projected=by_key_head), norm_offset=OFFSET),
    gguf=Architecture("qwen3next", "qwen3_next", "Qwen3NextForCausalLM", NAMES, gguf_config, undo, MTP_NAMES),
)
