"""Hugging Face tensors as conversion to GGUF writes them: the inverse of lockstep/weights/gguf/undo.py.

Written with reshapes where the code under test uses index arrays, so that a shared mistake is unlikely.
"""

import numpy as np

from tests.weights.files import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32

COMMON_STEMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
MTP = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}


def gguf_name(name: str, num_layers: int, post_norm: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    if name in WHOLE:
        return WHOLE[name]
    if name in MTP:
        return f"blk.{num_layers}.{MTP[name]}"
    owner, _, layer, rest = name.split(".", 3)
    layer = int(layer) + (num_layers if owner == "mtp" else 0)
    if rest.endswith("A_log"):
        return f"blk.{layer}.ssm_a"
    if rest.endswith("dt_bias"):
        return f"blk.{layer}.ssm_dt.bias"
    stem, _, suffix = rest.rpartition(".")
    return f"blk.{layer}.{ {**COMMON_STEMS, 'post_attention_layernorm': post_norm}[stem] }.{suffix}"


def interleave_rotary(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Llama's q and k rows: the two rows of a rotary pair, half a head apart, become adjacent."""
    size = rows.shape[0] // num_heads
    halves = rows.reshape(num_heads, 2, size // 2, *rows.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)


def tile_heads(array: np.ndarray, axis: int, num_keys: int, num_values: int) -> np.ndarray:
    """The delta rule's value heads, grouped by key head, reordered to one of each group in turn."""
    heads = np.split(array, num_values, axis=axis)
    per_key = num_values // num_keys
    order = [key * per_key + rank for rank in range(per_key) for key in range(num_keys)]
    return np.concatenate([heads[head] for head in order], axis=axis)


def convert_qwen35(name: str, array: np.ndarray, num_keys: int, num_values: int, num_qk_rows: int) -> np.ndarray:
    """What conversion does to a qwen3_5 tensor."""
    tile = lambda part, axis=0: tile_heads(part, axis, num_keys, num_values)
    if name.endswith("A_log"):
        return tile(-np.exp(array.astype(np.float32)))
    if name.endswith("dt_bias") or any(part in name for part in ("in_proj_z", "in_proj_a", "in_proj_b")):
        return tile(array)
    if "in_proj_qkv" in name or "conv1d" in name:
        array = array[:, 0] if "conv1d" in name else array
        return np.concatenate([array[:num_qk_rows], tile(array[num_qk_rows:])])
    if "out_proj" in name:
        return tile(array, 1)
    is_norm = "norm" in name.split(".")[-2] and "linear_attn" not in name
    return array.astype(np.float32) + np.float32(1) if is_norm else array


def stacked_experts(tensors: dict[str, np.ndarray], num_layers: int, fused: bool) -> dict[str, np.ndarray]:
    """The experts' matrices as GGUF stacks them, one below the other in one tensor, by GGUF's name.

    fused: gate and up in one tensor, as newer files have them.
    """
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in tensors.items():
        if ".experts." in name:
            place, part = name.split(".mlp.experts.")[0], name.split(".")[-2].removesuffix("_proj")
            layer = int(place.rpartition(".")[2]) + (num_layers if place.startswith("mtp.") else 0)
            stacks.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append(array)
    made = {name: np.stack(arrays) for name, arrays in stacks.items()}
    for name in [name for name in made if fused and "ffn_gate_exps" in name]:
        both = [made.pop(name), made.pop(name.replace("gate", "up"))]
        made[name.replace("gate", "gate_up")] = np.concatenate(both, 1)
    return made


NO_VOCABULARY = {"tokenizer.ggml.model": (STRING, "no_vocab")}  # llama.cpp reads files without a tokenizer then


def metadata(architecture: str, **values: object) -> dict[str, tuple[int, object]]:
    """GGUF metadata of an architecture. values: keys have "__" for "."; those of the tokenizer are not the
    architecture's."""
    pairs = {"general.architecture": (STRING, architecture)}
    for key, value in values.items():
        name = key.replace("__", ".")
        pairs[name if name.startswith("tokenizer.") else f"{architecture}.{name}"] = typed(value)
    return pairs


def typed(value: object) -> tuple[int, object]:
    """A Python value with the GGUF type that conversion would give it."""
    kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
    if isinstance(value, list):
        return ARRAY, (BOOL if isinstance(value[0], bool) else INT32, value)
    return kinds[type(value)], value
