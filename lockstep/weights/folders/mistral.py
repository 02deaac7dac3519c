"""Folders in Mistral's own form: params.json beside consolidated*.safetensors, as the Hugging Face checkpoint that
conversion makes of them.

The two rows of a rotary pair are side by side there, and half a head apart in Hugging Face checkpoints.
Source: conversion/mistral.py of llama.cpp, vllm/transformers_utils/configs/mistral.py of vLLM.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.weights import safetensors
from lockstep.weights.folders.folder import KEYS, unquantized
from lockstep.weights.mapped import read_json_object
from lockstep.weights.rearranged import half_split
from lockstep.weights.tensor import StoredTensor, TensorMap

PARAMS, STEM = "params.json", "consolidated"

RENAMED = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "head_dim": "head_dim",
    "n_kv_heads": "num_key_value_heads", "hidden_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size", "rope_theta": "rope_theta", "tied_embeddings": "tie_word_embeddings",
    "sliding_window": "sliding_window",
}  # fmt: skip
CONTEXTS = ("max_position_embeddings", "max_seq_len")
DEFAULT_CONTEXT = 32768  # of models whose files do not say it, as Mistral 7B
ROPE = {
    "factor": "factor", "original_max_position_embeddings": "original_max_position_embeddings", "beta": "beta_fast",
    "alpha": "beta_slow",
}  # fmt: skip
ALLOWED = {"model_type": "transformer", "activation": "silu", "causal": True, "use_biases": False}
# Sizes of training, and vision, which is not read.
IGNORED = {"max_batch_size", "model_parallel", "dtype", "torch_dtype", "vision_encoder", "multimodal"}
READ = {*RENAMED, *CONTEXTS, *ALLOWED, *IGNORED, *KEYS, "yarn", "llama_4_scaling"}

TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
SUFFIXES = {"qscale_weight": "weight_scale_inv", "qscale_act": "activation_scale"}  # of 8-bit floats
IN_LAYER = re.compile(r"layers\.(\d{1,6})\.((?:attention|feed_forward)\.\w+|\w+)\.(\w+)")
OF_VISION = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")


def is_native(folder: Path) -> bool:
    """Whether a folder is in Mistral's own form, and in no other."""
    has_weights = any(not path.name.startswith(STEM) for path in folder.glob("*.safetensors"))
    return (folder / PARAMS).is_file() and not has_weights and not (folder / safetensors.INDEX_NAME).is_file()


def open_native(folder: Path, tensors: TensorMap) -> tuple[dict[str, Any], TensorMap]:
    """(config.json, tensors by Hugging Face name) of a folder whose files hold these tensors.

    ValueError names the key of params.json, or the tensor, that is wrong or not supported.
    """
    config = config_of(folder)
    whole = unquantized(config, _renamed(tensors))
    return config, _half_split(whole, config)


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder of Mistral's. ValueError names the key of params.json that is wrong or not supported."""
    params = read_json_object(folder / PARAMS)
    try:
        return _config(params)
    except ValueError as error:
        raise ValueError(f"{PARAMS}: {error}") from None


def _config(params: Mapping[str, Any]) -> dict[str, Any]:
    _check_keys(params)
    config = {name: params[key] for key, name in RENAMED.items() if params.get(key) is not None}
    context = next((params[key] for key in CONTEXTS if params.get(key) is not None), DEFAULT_CONTEXT)
    config |= {"max_position_embeddings": context, "hidden_act": "silu"}
    config |= {"sliding_window": params.get("sliding_window"), **_family(params)}
    if params.get("yarn"):
        theta = config.pop("rope_theta", 10000.0)
        config["rope_parameters"] = {"rope_theta": theta, **_yarn(params["yarn"]), **_growth(params)}
    return config | _quantization(params)


def _check_keys(params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if key in ALLOWED and value is not None and value != ALLOWED[key]:
            raise ValueError(f"key {key!r}: {value!r:.80} is not supported, only {ALLOWED[key]!r}")
        if key not in READ and value not in (None, False, [], {}):
            raise ValueError(f"key {key!r} (value {value!r:.80}) is not supported, and it may change the result")
    if params.get("llama_4_scaling") and not params.get("yarn"):
        raise ValueError("key 'llama_4_scaling' is not supported without 'yarn'")
    if isinstance(params.get("sliding_window"), list):
        raise ValueError(f"key 'sliding_window': a list is not supported, got {params['sliding_window']!r:.80}")


def _family(params: Mapping[str, Any]) -> dict[str, Any]:
    name, model_type = ("Ministral3", "ministral3") if params.get("llama_4_scaling") else ("Mistral", "mistral")
    return {"model_type": model_type, "architectures": [f"{name}ForCausalLM"]}


def _yarn(yarn: Any) -> dict[str, Any]:
    """The rope's parameters. Tables of cosines have a factor only if the file asks for it with apply_scale."""
    known = {*ROPE, "apply_scale"}
    if not isinstance(yarn, dict) or not yarn.keys() <= known or yarn.get("apply_scale") not in (None, True, False):
        raise ValueError(f"key 'yarn': expected an object of {', '.join(sorted(known))}, got {yarn!r:.200}")
    unscaled = {} if yarn.get("apply_scale") else {"mscale": 1.0, "mscale_all_dim": 1.0}
    return {"rope_type": "yarn", **{name: yarn[key] for key, name in ROPE.items() if key in yarn}, **unscaled}


def _growth(params: Mapping[str, Any]) -> dict[str, Any]:
    """How queries grow with their position."""
    growth, context = params.get("llama_4_scaling"), "original_max_position_embeddings"
    if not growth:
        return {}
    if (
        not isinstance(growth, dict)
        or growth.keys() != {context, "beta"}
        or growth[context] != params["yarn"].get(context)
    ):
        raise ValueError(f"key 'llama_4_scaling': expected beta, and the {context} of yarn, got {growth!r:.200}")
    return {"llama_4_scaling_beta": growth["beta"]}


def _quantization(params: Mapping[str, Any]) -> dict[str, Any]:
    key = next((key for key in KEYS if params.get(key)), None)
    if key is None:
        return {}
    given = params[key]
    if not isinstance(given, dict) or "quant_method" in given:
        return {"quantization_config": given}
    if given.get("qformat_weight") != "fp8_e4m3" or given.get("qscheme_act") not in (None, "TENSOR", "NO_SCALES"):
        raise ValueError(f"key {key!r}: only fp8_e4m3 with scales of a tensor is supported, got {given!r:.200}")
    return {"quantization_config": {"quant_method": "fp8"}}


def _renamed(tensors: TensorMap) -> TensorMap:
    """The tensors under their Hugging Face names, without those of vision."""
    sources: dict[str, str] = {}
    for source in tensors:
        if not source.startswith(OF_VISION):
            name = _hf_name(source)
            if name in sources:
                raise ValueError(f"tensors {source!r} and {sources[name]!r} are both {name!r}")
            sources[name] = source
    infos = {name: replace(tensors.info[source], name=name) for name, source in sources.items()}
    return TensorMap(infos, lambda name: replace(tensors[sources[name]], name=name))


def _hf_name(name: str) -> str:
    layer = IN_LAYER.fullmatch(name)
    module, _, suffix = (layer[2], "", layer[3]) if layer else name.rpartition(".")
    hf = (LAYER if layer else TOP).get(module)
    if hf is None:
        raise ValueError(f"tensor {name!r} is not one that a model of {PARAMS} is known to have")
    return f"{f'model.layers.{layer[1]}.' if layer else ''}{hf}.{SUFFIXES.get(suffix, suffix)}"


def _half_split(tensors: TensorMap, config: Mapping[str, Any]) -> TensorMap:
    """The tensors with the rows of queries and keys in the order of Hugging Face checkpoints."""
    kv_heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    heads = {".q_proj.weight": config.get("num_attention_heads"), ".k_proj.weight": kv_heads}

    def load(name: str) -> StoredTensor:
        num_heads = next((number for end, number in heads.items() if name.endswith(end)), None)
        return tensors[name] if num_heads is None else half_split(tensors[name], num_heads)

    return TensorMap(tensors.info, load)
