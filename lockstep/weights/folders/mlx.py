"""MLX folders: codes of 2 to 8 bits in groups, w = q * scale + bias; embeddings and heads are quantized, too.

    X.weight uint32 [N, K * bits / 32], code k at bit k * bits, lowest first; X.scales, X.biases [N, K / group_size]

Experts are stacks [experts, N, ...] of `switch_mlp`, which become tensors of their own. Source: mlx-lm's models.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lockstep.weights.folders.keys import only, whole
from lockstep.weights.folders.modules import FLOATS, WORDS, Module, grouped, modules_with, replaced, unpacked
from lockstep.weights.tensor import MadeTensor, StoredTensor, TensorMap

PARTS = ("weight", "scales", "biases")
STACK, EACH = ".switch_mlp.", ".experts.{}."


def open_mlx(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with weights in the place of MLX's. ValueError names the key or the tensor that is wrong."""
    modules = modules_with(tensors, "scales")
    made = [weight for module in modules for weight in _weights(module, _settings(config, module.name))]
    dropped = (module.full(part) for module in modules for part in PARTS)
    return replaced(tensors, made, [*dropped])


def _settings(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Those of a layer: its own, where the config has some under its name."""
    own = config.get(name)
    settings = {**config, **own} if isinstance(own, dict) else config
    only(settings, "mode", "affine")
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
    scales, biases = (module.get(name, FLOATS, *E, N, K // group) for name in ("scales", "biases"))
    if not stack:
        yield _weight(words.name, (words, scales, biases), bits, K, lambda tensor, rows: tensor.read(rows))
    for e in range(E[0] if stack else 0):
        name = words.name.replace(STACK, EACH.format(e))
        if name == words.name:
            raise ValueError(f"tensor {name!r}: stacks are supported only of 'switch_mlp'")
        yield _weight(name, (words, scales, biases), bits, K, lambda tensor, rows, e=e: _of_stack(tensor, e, rows))


def _of_stack(tensor: StoredTensor, e: int, rows: slice) -> np.ndarray:
    return tensor.read(slice(e, e + 1))[0, rows]


def _weight(name: str, parts: tuple[StoredTensor, ...], bits: int, K: int, read: Any) -> MadeTensor:
    words, scales, biases = parts
    return grouped(
        name,
        (words.shape[-2], K),
        bits,
        scales.shape[-1],
        lambda rows: unpacked(read(words, rows), bits, K),
        lambda rows: (read(scales, rows).astype(np.float32), read(biases, rows).astype(np.float32)),
    )
