"""From GGUF metadata to a Hugging Face config: the keys that all architectures have. Each family adds its own.

Source: src/llama-arch.cpp, src/llama-model.cpp and conversion/*.py of llama.cpp.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep.weights.gguf.architecture import Architecture
from lockstep.weights.gguf.keys import Keys
from lockstep.weights.gguf.rope import LLAMA3_CONTEXT, llama3_scaling
from lockstep.weights.tensor import TensorInfo

LONGROPE = {"rope_factors_long.weight", "rope_factors_short.weight"}
# The pooling types of llama.cpp by number.
POOLINGS: Mapping[int, str] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}


def hf_config(
    architecture: Architecture,
    metadata: Mapping[str, object],
    infos: Mapping[str, TensorInfo],
    rope_factors: Mapping[str, np.ndarray],
    where: str,
) -> dict:
    """The equivalent of config.json.

    infos: the file's tensors by GGUF name. rope_factors: the tensors of `ROPE_FACTORS` that there are, float32 [K / 2].
    where: the file, for errors. Raises ValueError for metadata that is missing, inconsistent or not supported.
    """
    keys = Keys(metadata, architecture.name, where, architecture.varying)
    config = _common(keys, metadata, infos, architecture, where)
    config |= _rope(keys, config, rope_factors, architecture, where)
    config = architecture.config(config, keys, infos)
    keys.check_all_used()
    return config


def _common(
    keys: Keys, metadata: Mapping[str, object], infos: Mapping[str, TensorInfo], architecture: Architecture, where: str
) -> dict:
    if "token_embd.weight" not in infos or len(infos["token_embd.weight"].shape) != 2:
        raise ValueError(f"{where}: tensor 'token_embd.weight' [vocabulary, width] is missing")
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if num_heads == 0 or hidden_size == 0:
        raise ValueError(f"{where}: {hidden_size} embedding_length and {num_heads} heads, expected more than 0")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{where}: value heads of another size than key heads ({head_dim}) are not supported")
    num_layers = keys.integer("block_count") - keys.integer("nextn_predict_layers", 0)
    if not 0 < num_layers < len(infos):
        raise ValueError(f"{where}: {num_layers} layers do not fit a file of {len(infos)} tensors")
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "vocab_size": infos["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length", 0),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads, but=0),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in infos,
        **_pooling(keys, where),
        **_token_ids(metadata, infos["token_embd.weight"].shape[0]),
    }


def _pooling(keys: Keys, where: str) -> dict[str, str]:
    """The pooling of hidden states into a text's embedding, as `pooling_type`: config.json has no such key."""
    number = keys.integer("pooling_type", 0)
    pooling = POOLINGS.get(number, str(number))
    if pooling not in ("none", "mean", "last"):
        raise ValueError(f"{where}: pooling_type {pooling} is not supported, only none, mean and last")
    return {} if pooling == "none" else {"pooling_type": pooling}


def _token_ids(metadata: Mapping[str, object], vocab_size: int) -> dict[str, object]:
    """The ids of special tokens, without ids outside the vocabulary: some conversions write 2^32 - 1 for none."""
    token_ids = {name: metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
    is_token = lambda value: type(value) is not int or 0 <= value < vocab_size
    return {name: value for name, value in token_ids.items() if value is not None and is_token(value)}


def _rope(keys: Keys, config: dict, factors: Mapping[str, np.ndarray], architecture: Architecture, where: str) -> dict:
    theta = keys.number("rope.freq_base", 10000.0)
    head_dim = config["head_dim"]
    rope_dim = keys.integer("rope.dimension_count", head_dim)
    has_rope_dim = "rope.dimension_count" in keys  # otherwise it is head_dim, which is checked with the model
    if theta < 1 or (has_rope_dim and (rope_dim % 2 or not 0 < rope_dim <= head_dim)):
        raise ValueError(f"{where}: rope.dimension_count {rope_dim}, base {theta} do not fit heads of {head_dim}")
    frequencies = factors.get("rope_freqs.weight")
    if frequencies is not None and len(factors) == 1 and architecture.rope_factors is not None:
        scaling = architecture.rope_factors(frequencies, rope_dim, where)
    else:
        scaling = _scaling(keys, theta, rope_dim, factors, where)
    partial = {"partial_rotary_factor": rope_dim / head_dim} if rope_dim != head_dim else {}
    return {"rope_theta": theta, "rope_scaling": scaling, **partial}


def _scaling(
    keys: Keys, theta: float, rope_dim: int, factors: Mapping[str, np.ndarray], where: str
) -> dict[str, Any] | None:
    scaling_type = keys.text("rope.scaling.type", "none")
    if factors.keys() <= LONGROPE and "rope_factors_long.weight" in factors and scaling_type in ("none", "longrope"):
        return _longrope_scaling(keys, factors)
    if factors.keys() == {"rope_freqs.weight"} and scaling_type in ("none", "llama3"):
        original = keys.integer("rope.scaling.original_context_length", LLAMA3_CONTEXT)
        return llama3_scaling(theta, rope_dim, factors["rope_freqs.weight"], original, where)
    if factors:
        names = " and ".join(repr(name) for name in factors)
        raise ValueError(
            f"{where}: rope.scaling.type {scaling_type!r} beside {names}: expected none of these tensors, or "
            f"'rope_freqs.weight' alone with type none or llama3, or both lists of factors with none or longrope"
        )
    if scaling_type == "none":
        return None
    if scaling_type == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if scaling_type != "yarn":
        raise ValueError(f"{where}: rope.scaling.type {scaling_type!r} is not supported, only none, linear and yarn")
    return yarn_scaling(keys)


def _longrope_scaling(keys: Keys, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """With which of the two lists of factors a model runs is decided when its config is read."""
    lists = {f"{which}_factor": factors.get(f"rope_factors_{which}.weight") for which in ("long", "short")}
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        **{name: None if values is None else values.ravel().tolist() for name, values in lists.items()},
    }
    if "rope.scaling.attn_factor" in keys:
        scaling["attention_factor"] = keys.number("rope.scaling.attn_factor")
    return scaling


def yarn_scaling(keys: Keys) -> dict:
    """The scaling of a file with yarn."""
    scaling = {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
    }
    renamed = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}
    present = {name: key for key, name in renamed.items() if f"rope.scaling.{key}" in keys}
    return scaling | {name: keys.number(f"rope.scaling.{key}") for name, key in present.items()}
