"""AWQ and GPTQ folders: codes and scales whose columns are output features.

    AWQ   qweight int32 [K, N / 8], qzeros int32 [K / g, N / 8], scales [K / g, N]: w = (q - z) * s; the nibbles of a
          word are columns 0, 2, 4, 6, 1, 3, 5, 7
    GPTQ  qweight int32 [K * bits / 32, N], codes of a column lowest first, qzeros int32 [K / g, N * bits / 32], scales
          [K / g, N], g_idx int32 [K]: w = (q - z - 1) * s, without the 1 in files of checkpoint_format gptq_v2

Weights whose groups are not runs of input features (act-order) have their columns sorted by group.
Source: transformers' and mlx-lm's readers; llama.cpp's conversion/base.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep.weights.folders.keys import only, whole
from lockstep.weights.folders.modules import (
    FLOATS,
    WORDS,
    LastRead,
    Module,
    group_of_columns,
    grouped,
    modules_with,
    num_words,
    replaced,
    unpacked,
    zero_based,
)
from lockstep.weights.tensor import MadeTensor, TensorMap

NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
FORMATS = ("gptq", "gptq_v2")
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def open_awq(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with weights in the place of AWQ's. ValueError names the key or the tensor that is wrong."""
    whole(config, "bits", 4)
    for key in ("version", "format"):
        only(config, key, "gemm", "GEMM")
    only(config, "zero_point", True)
    group, last = whole(config, "group_size"), LastRead()
    return _with(tensors, lambda module: _awq(module, group, last))


def open_gptq(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with weights in the place of GPTQ's. ValueError names the key or the tensor that is wrong."""
    _check_all_alike(config)
    bits, group, last = whole(config, "bits", 2, 4, 8), whole(config, "group_size"), LastRead()
    more = 0 if _checkpoint_format(config) == "gptq_v2" else 1
    return _with(tensors, lambda module: _gptq(module, bits, group, more, last))


def _check_all_alike(config: Mapping[str, Any]) -> None:
    """ValueError if GPTQModel's `dynamic` gives some layers settings of their own. Patterns that begin with "-:" name
    layers that are not quantized, which is seen by their tensors."""
    dynamic = config.get("dynamic") or {}
    own = [pattern for pattern in dynamic if not pattern.startswith("-:")] if isinstance(dynamic, dict) else [dynamic]
    if own:
        raise ValueError(
            f"quantization_config key 'dynamic': {own[0]!r} is not supported, only patterns of layers that are not "
            f"quantized, which begin with '-:'"
        )


def _checkpoint_format(config: Mapping[str, Any]) -> str:
    """gptq or gptq_v2. Tools name it under one key, or under both."""
    only(config, "is_marlin_format", False)
    named = [config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None]
    for key in ("checkpoint_format", "format"):
        only(config, key, *FORMATS)
    if len({*named}) > 1:
        raise ValueError(f"quantization_config keys 'checkpoint_format' and 'format': {named[0]!r} is not {named[1]!r}")
    return named[0] if named else FORMATS[0]


def _with(tensors: TensorMap, weight_of: Any) -> TensorMap:
    modules = modules_with(tensors, "qweight")
    if not modules:
        raise ValueError("the config has a quantization_config, but no tensor is named '...qweight'")
    made = [weight_of(module) for module in modules]
    return replaced(tensors, made, (module.full(part) for module in modules for part in PARTS))


def _num_groups(module: Module, K: int, group: int) -> int:
    """K / group, and 1 for group_size -1."""
    group = K if group == -1 else group
    if group < 1 or K % group:
        raise ValueError(f"tensor {module.full('qweight')!r}: group_size {group} does not divide rows of {K} weights")
    return K // group


def _awq(module: Module, group: int, last: LastRead) -> MadeTensor:
    words = module.get("qweight", WORDS, None, None)
    K, N = words.shape[0], 8 * words.shape[1]
    G = _num_groups(module, K, group)
    scales, zeros = module.get("scales", FLOATS, G, N), module.get("qzeros", WORDS, G, N // 8)

    def columns(packed: np.ndarray, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(N)
        nibbles = unpacked(packed[:, start // 8 : -(-stop // 8)], 4, 8 * (-(-stop // 8) - start // 8))
        ordered = nibbles.reshape(len(packed), -1, 8)[..., NIBBLE_OF_COLUMN].reshape(len(packed), -1)
        return np.ascontiguousarray(ordered[:, start % 8 :][:, : stop - start].T)

    return grouped(
        module.full("weight"),
        (N, K),
        4,
        G,
        lambda rows: columns(last.read(words), rows),
        lambda rows: zero_based(scales.read()[:, rows].T, columns(zeros.read(), rows)),
    )


def _gptq(module: Module, bits: int, group: int, more: int, last: LastRead) -> MadeTensor:
    words = module.get("qweight", WORDS, None, None)
    K, N = words.shape[0] * 32 // bits, words.shape[1]
    G = _num_groups(module, K, group)
    scales, zeros = module.get("scales", FLOATS, G, N), module.get("qzeros", WORDS, G, num_words(N, bits))
    zero = lambda rows: unpacked(zeros.read(), bits, N)[:, rows].T.astype(np.int32) + more
    return grouped(
        module.full("weight"),
        (N, K),
        bits,
        G,
        lambda rows: unpacked(last.read(words)[:, rows].T, bits, K),
        lambda rows: zero_based(scales.read()[:, rows].T, zero(rows)),
        group_of_columns(module, "g_idx", K, G),
    )
