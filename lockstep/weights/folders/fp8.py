"""Weights of 8-bit floats (e4m3) with a scale for a tensor, a row or a block of it: w = number * scale.

They are read as bf16: the product, in float32, is rounded once, by at most 2^-9 of it, as transformers does when it
dequantizes. Grids of activations that such folders may name are not used: activations are not rounded to 8-bit floats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lockstep.weights.folders.modules import FLOATS, Module, modules_with, replaced
from lockstep.weights.tensor import MadeTensor, StoredTensor, TensorMap

FP8 = "f8_e4m3"
SCALE_FORMATS = (*FLOATS, "f8_e8m0")
SCALES = ("weight_scale_inv", "weight_scale", "scale")
ACTIVATIONS = ("input_scale", "input_global_scale", "activation_scale", "input_activation_scale", "k_scale", "v_scale")


def open_fp8(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with weights in the place of 8-bit ones. ValueError names the key or the tensor that is wrong."""
    made, dropped = fp8_weights(tensors, block_of(config.get("weight_block_size"), "weight_block_size"))
    return replaced(tensors, made, dropped)


def block_of(size: object, key: str) -> tuple[int, int] | None:
    """Rows and columns of a block, from a config."""
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n <= 1 << 20 for n in size):
        raise ValueError(f"quantization_config key {key!r}: expected two sizes, got {size!r}")
    return size[0], size[1]


def fp8_weights(tensors: TensorMap, block: tuple[int, int] | None) -> tuple[list[MadeTensor], list[str]]:
    """(weights made of 8-bit floats, names of the tensors they are made of, and of scales of activations)."""
    modules = [m for m in modules_with(tensors, "weight") if tensors.info[m.full("weight")].format.startswith("f8_")]
    dropped = [module.full(part) for module in modules for part in ("weight", *SCALES)]
    dropped += [name for name in tensors if name.endswith(tuple(f".{part}" for part in ACTIVATIONS))]
    return [_weight(module, block) for module in modules], dropped


def _weight(module: Module, block: tuple[int, int] | None) -> MadeTensor:
    numbers = module.get("weight", (FP8,), None, None)
    N, K = numbers.shape
    scale, (height, width) = _scale(module, (N, K), block)

    def make(rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(N)
        by_row = scale[np.arange(start, stop) // height]
        products = numbers.read(rows).astype(np.float32) * by_row[:, np.arange(K) // width]
        return products.astype(ml_dtypes.bfloat16)

    return MadeTensor.of(module.full("weight"), "bf16", (N, K), make)


def _scale(module: Module, shape: Sequence[int], block: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """Scales float32 [rows, columns], and the rows and columns of weights that share one."""
    name = next((part for part in SCALES if module.has(part)), SCALES[0])
    if not module.has(name):
        raise ValueError(f"tensor {module.full(name)!r} is missing from the checkpoint")
    stored: StoredTensor = module.tensors[module.full(name)]
    N, K = shape
    forms = {(): (N, K), (1,): (N, K), (1, 1): (N, K), (N, 1): (1, K), (N,): (1, K)}
    if block:
        forms[-(-N // block[0]), -(-K // block[1])] = block
    if stored.format not in SCALE_FORMATS or stored.shape not in forms:
        expected = f"{' or '.join(SCALE_FORMATS)} of one of the shapes {', '.join(str(list(form)) for form in forms)}"
        raise ValueError(f"tensor {stored.name!r}: expected {expected}, found {stored.format} {list(stored.shape)}")
    size = forms[stored.shape]
    return stored.read().astype(np.float32).reshape(-(-N // size[0]), -(-K // size[1])), size
