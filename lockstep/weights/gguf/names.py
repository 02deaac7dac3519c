"""From GGUF tensor names to Hugging Face names: tables that architectures share, and the translation.

Source: gguf-py/gguf/tensor_mapping.py and conversion/*.py of llama.cpp.
"""

import re
from collections.abc import Mapping

from lockstep.weights.gguf.architecture import Architecture

# Entries have no suffix: they hold for names with .weight and with .bias.
TOP: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
# The projections of `ATTENTION` may be one tensor in any file, which `model.py` cuts.
FUSED_ATTENTION: Mapping[str, str] = {"attn_qkv": "self_attn.{qkv}_proj"}
HEAD_NORMS: Mapping[str, str] = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MLP: Mapping[str, str] = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Stacked [experts, rows, columns] in GGUF, one tensor per expert in Hugging Face checkpoints. Newer files may have gate
# and up of all experts in one tensor, as newer checkpoints.
EXPERTS: Mapping[str, str] = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
}
# The expert that all tokens share.
SHARED_EXPERT: Mapping[str, str] = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
DENSE = {**ATTENTION, **MLP, "ffn_norm": "post_attention_layernorm"}

# Tensors whose content is a part of the config.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Ollama's files have vision in them, and some a draft head under its Hugging Face names, which is not read.
NOT_TEXT = ("v.", "mm.", "mtp.")


def hf_name(architecture: Architecture, name: str, num_layers: int) -> str | None:
    """The Hugging Face name of GGUF tensor `name`; None for a tensor that is a part of the config or of vision.

    Blocks from `num_layers` on are multi-token-prediction layers. Names of tensors that are several contain the
    marks of `model.py`: "{expert}". Raises ValueError for a name that the architecture does not have.
    """
    if name in ROPE_FACTORS or name.startswith(NOT_TEXT):
        return None
    block, top = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name), {**TOP, **architecture.top_names}
    hf = _layer_name(architecture, int(block[1]), block[2], num_layers) if block else _renamed(top, name)
    if hf is None:
        raise ValueError(f"tensor {name!r} is not one that architecture {architecture.name!r} is known to have")
    return hf


def _layer_name(architecture: Architecture, layer: int, name: str, num_layers: int) -> str | None:
    is_mtp = layer >= num_layers
    if is_mtp and (hf := _renamed(architecture.mtp_names, name)):
        return hf
    fused = FUSED_ATTENTION if "attn_q" in architecture.names else {}
    hf = _renamed({**fused, **architecture.names}, name)
    prefix = f"mtp.layers.{layer - num_layers}" if is_mtp else f"model.layers.{layer}"
    return hf and f"{prefix}.{hf}"


def _renamed(names: Mapping[str, str], name: str) -> str | None:
    if name in names:
        return names[name]
    stem, _, suffix = name.rpartition(".")
    return f"{names[stem]}.{suffix}" if stem in names and suffix in ("weight", "bias") else None
