"""MLX folders: codes of 2 to 8 bits in groups, w = q * scale + bias; embeddings and heads are quantized, too.

    X.weight uint32 [N, K * bits / 32], code k at bit k * bits, lowest first; X.scales, X.biases [N, K / group_size]

In mode mxfp4 there are no biases, and scales are bytes, 2^(e - 127), of 32 weights. Experts are stacks [experts, N,
...], which become tensors of their own (`mlx_names.py`). Source: mlx-lm's models.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lockstep.formats.mxfp4 import MXFP4, from_pairs
from lockstep.weights.folders.keys import only, whole
from lockstep.weights.folders.mlx_names import expert_name
from lockstep.weights.folders.modules import FLOATS, WORDS, Module, grouped, modules_with, replaced, unpacked
from lockstep.weights.tensor import MadeTensor, StoredTensor, TensorMap, bounded, numbers_of

PARTS = ("weight", "scales", "biases")
MODES = ("affine", MXFP4.name)
SIZES = {"bits": 4, "group_size": 32}  # of mxfp4


def open_mlx(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with weights in the place of MLX's. ValueError names the key or the tensor that is wrong."""
    modules = modules_with(tensors, "scales")
    made = bounded(weight for module in modules for weight in _weights(module, _settings(config, module.name)))
    dropped = (module.full(part) for module in modules for part in PARTS)
    return replaced(tensors, made, [*dropped])


def _settings(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Those of a layer: its own, where the config has some under its name."""
    own = config.get(name)
    settings = {**config, "mode": None, **own} if isinstance(own, dict) else config
    only(settings, "mode", *MODES)
    return settings


def _weights(module: Module, settings: Mapping[str, Any]) -> Iterator[MadeTensor]:
    bits, group = whole(settings, "bits", 2, 3, 4, 5, 6, 8), whole(settings, "group_size")
    stack = len(module.tensors.info[module.full("scales")].shape) == 3
    sizes = (None,) * (3 if stack else 2)
    words = module.get("weight", WORDS, *sizes)
    *E, N, W = words.shape
    K = W * 32 // bits
    if group < 1 or K % group or (W * 32) % bits:
        raise ValueError(f"tensor {words.name!r}: {W} words a row are not groups of {group} codes of {bits} bits")
    if settings.get("mode") == MXFP4.name:
        for key, value in SIZES.items():
            whole(settings, key, value)
        parts: tuple[StoredTensor, ...] = (words, module.get("scales", ("u8",), *E, N, K // group))
    else:
        parts = (words, *(module.get(name, FLOATS, *E, N, K // group) for name in ("scales", "biases")))
    if not stack:
        yield _weight(words.name, parts, bits, K, lambda tensor, rows: tensor.read(rows))
    for e in numbers_of(module.tensors.info[words.name]) if stack else ():
        name = expert_name(words.name, e)
        yield _weight(name, parts, bits, K, lambda tensor, rows, e=e: _of_stack(tensor, e, rows))


def _of_stack(tensor: StoredTensor, e: int, rows: slice) -> np.ndarray:
    return tensor.read(slice(e, e + 1))[0, rows]


def _weight(name: str, parts: tuple[StoredTensor, ...], bits: int, K: int, read: Any) -> MadeTensor:
    if len(parts) == 2:
        return _microscaled(name, parts, K, read)
    words, scales, biases = parts
    return grouped(
        name,
        (words.shape[-2], K),
        bits,
        scales.shape[-1],
        lambda rows: unpacked(read(words, rows), bits, K),
        lambda rows: (read(scales, rows).astype(np.float32), read(biases, rows).astype(np.float32)),
    )


def _microscaled(name: str, parts: tuple[StoredTensor, ...], K: int, read: Any) -> MadeTensor:
    """The weight of mode mxfp4: bytes of two neighbours each, and exponents."""
    words, scales = parts

    def make(rows: slice) -> np.ndarray:
        exponents = read(scales, rows)
        pairs = np.ascontiguousarray(read(words, rows)).view(np.uint8)
        return from_pairs(pairs.reshape(*exponents.shape, 16), exponents)

    return MadeTensor.of(name, MXFP4.name, (words.shape[-2], K), make)
