"""compressed-tensors folders: integers in groups, packed or not, and 8-bit floats.

    pack-quantized   X.weight_packed int32 [N, K * bits / 32], code k at bit k * bits; X.weight_scale [N, groups],
                     X.weight_shape int64 [2]; asymmetric: X.weight_zero_point int32 [N * bits / 32, groups], packed
                     along its rows. w = (q - z) * scale, where q and z are codes less 2^(bits - 1); z is 0 if absent
    int-quantized    X.weight int8 [N, K], X.weight_scale [N, groups], X.weight_zero_point int8 [N, groups]
    float-quantized  X.weight e4m3, see fp8.py
    nvfp4-pack-quantized  X.weight_packed uint8 [N, K / 2], floats of 4 bits, the first in the low ones; X.weight_scale
                     e4m3 [N, K / 16], X.weight_global_scale float32 [1]. w = number * (scale / global scale)

Which layers are quantized, and how, their tensors say; the config must agree. Activations that int-quantized folders
round dynamically are rounded as those of all integer formats, for every 32. Source: compressed-tensors 0.20.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lockstep.formats.fp4 import rows as fp4
from lockstep.weights.folders.fp8 import block_of, fp8_weights
from lockstep.weights.folders.keys import only
from lockstep.weights.folders.modules import (
    FLOATS,
    Module,
    by_channel,
    group_of_columns,
    grouped,
    is_by_channel,
    modules_with,
    num_words,
    replaced,
    unpacked,
    zero_based,
)
from lockstep.weights.tensor import MadeTensor, StoredTensor, TensorMap

INTEGERS, FLOATS_OF_8 = ("pack-quantized", "int-quantized"), ("float-quantized", "naive-quantized")
FORMATS = (*INTEGERS, *FLOATS_OF_8, "nvfp4-pack-quantized", "mixed-precision", "dense")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")


class Scheme(NamedTuple):
    """How the config says that some layers are quantized. group: weights that share a scale; None: a whole row."""

    bits: int
    kind: str
    symmetric: bool
    group: int | None
    block: tuple[int, int] | None


def open_compressed(config: Mapping[str, Any], tensors: TensorMap) -> TensorMap:
    """The tensors with weights in the place of quantized ones. ValueError names the key or the tensor that is wrong."""
    only(config, "format", *FORMATS)
    for key in ("kv_cache_scheme", "transform_config"):
        only(config, key, {})
    sparse = config.get("sparsity_config")
    if isinstance(sparse, dict):
        only(sparse, "format", "dense")
    schemes = _schemes(config)
    packed, plain = modules_with(tensors, "weight_packed"), _plain_integers(tensors)
    made = [(_floats if _is_float(module) else _packed)(module, schemes) for module in packed]
    made += [_integers(module, schemes) for module in plain]
    floats, dropped = fp8_weights(tensors, next((s.block for s in schemes if s.block), None))
    dropped += [module.full(part) for module in (*packed, *plain) for part in PARTS]
    return replaced(tensors, [*made, *floats], dropped)


def _plain_integers(tensors: TensorMap) -> list[Module]:
    return [m for m in modules_with(tensors, "weight") if tensors.info[m.full("weight")].format == "i8"]


def _schemes(config: Mapping[str, Any]) -> list[Scheme]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"quantization_config key 'config_groups': expected groups of layers, got {groups!r}")
    return [_scheme(group) for group in groups.values()]


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ValueError(f"quantization_config key 'weights': expected an object, got {weights!r}")
    only(weights, "type", "int", "float")
    only(weights, "num_bits", *range(2, 9))
    only(weights, "strategy", "group", "channel", "tensor", "block", "tensor_group")
    only(weights, "symmetric", True, False)
    kind, size = weights.get("type", "int"), weights.get("group_size")
    _check_activations(group, kind)
    if size is not None and (type(size) is not int or not -1 <= size <= 1 << 20):
        raise ValueError(f"quantization_config key 'group_size': expected an integer, got {size!r}")
    whole_rows = weights.get("strategy") in ("channel", "tensor") or size in (None, -1)
    block = block_of(_sizes(weights.get("block_structure")), "block_structure")
    symmetric = weights.get("symmetric") is not False
    return Scheme(weights.get("num_bits", 8), kind, symmetric, None if whole_rows else size, block)


def _sizes(block: Any) -> Any:
    """The sizes of a block, which older files write as '128x128'."""
    parts = block.split("x") if isinstance(block, str) and len(block) < 20 else []
    return [int(part) for part in parts] if parts and all(p.isascii() and p.isdigit() for p in parts) else block


def _check_activations(group: Mapping[str, Any], kind: str) -> None:
    """ValueError for activations on a fixed grid of integers, which would change the result."""
    only(group, "output_activations", {})
    given = group.get("input_activations")
    if isinstance(given, dict) and given and kind == "int":
        only(given, "dynamic", True, "local")
        only(given, "type", "int")
        only(given, "num_bits", 8)
        if given.get("dynamic") is None:
            raise ValueError("quantization_config key 'input_activations': a fixed grid is not supported")


def _check(name: str, found: Scheme, schemes: list[Scheme], K: int) -> None:
    """ValueError unless the config has this scheme."""
    expected = [s._replace(group=None if s.group == K else s.group, block=None) for s in schemes]
    if found._replace(group=None if found.group == K else found.group) not in expected:
        raise ValueError(
            f"tensor {name!r}: {found.bits} bits in groups of {found.group}, symmetric {found.symmetric}, which none "
            f"of the quantization_config's config_groups says"
        )


def _packed(module: Module, schemes: list[Scheme]) -> MadeTensor:
    words = module.get("weight_packed", ("i32",), None, None)
    N, K = _shape(module, words)
    bits = next((b for b in (2, 4, 8) if num_words(K, b) == words.shape[1]), 0)
    if not bits:
        raise ValueError(f"tensor {words.name!r}: {words.shape[1]} words do not hold {K} codes of 2, 4 or 8 bits")
    scales = module.get("weight_scale", FLOATS, N, None)
    G, symmetric = scales.shape[1], not module.has("weight_zero_point")
    _check(words.name, Scheme(bits, "int", symmetric, K // G, None), schemes, K)
    group_of = group_of_columns(module, "weight_g_idx", K, G)
    if symmetric and is_by_channel(bits, G, K):
        signed = lambda rows: (unpacked(words.read(rows), bits, K) ^ np.uint8(128)).view(np.int8)
        return by_channel(module.full("weight"), (N, K), signed, scales.read)
    zeros = None if symmetric else module.get("weight_zero_point", ("i32",), num_words(N, bits), G)

    def zero(rows: slice) -> np.ndarray | int:
        return 1 << bits - 1 if zeros is None else unpacked(zeros.read().T, bits, N)[:, rows].T

    return grouped(
        module.full("weight"),
        (N, K),
        bits,
        G,
        lambda rows: unpacked(words.read(rows), bits, K),
        lambda rows: zero_based(scales.read(rows), zero(rows)),
        group_of,
    )


def _is_float(module: Module) -> bool:
    """Whether a layer's packed numbers are floats of 4 bits."""
    return module.tensors.info[module.full("weight_packed")].format == "u8"


def _floats(module: Module, schemes: list[Scheme]) -> MadeTensor:
    pairs = module.get("weight_packed", ("u8",), None, None)
    N, K = pairs.shape[0], 2 * pairs.shape[1]
    _check(pairs.name, Scheme(4, "float", True, fp4.GROUP, None), schemes, K)
    scales = module.get("weight_scale", ("f8_e4m3",), N, -(-K // fp4.GROUP))
    whole = module.get("weight_global_scale", ("f32",), 1).read()

    def rows_of(rows: slice) -> np.ndarray:
        with np.errstate(all="ignore"):  # scales that are not finite are refused when they are packed
            return fp4.rows_of_scales(unpacked(pairs.read(rows), 4, K), scales.read(rows).astype(np.float32) / whole)

    try:
        return MadeTensor.of(module.full("weight"), fp4.FORMAT.name, (N, K), rows_of)
    except ValueError as error:
        raise ValueError(f"tensor {pairs.name!r}: {error}") from None


def _shape(module: Module, words: StoredTensor) -> tuple[int, int]:
    """[N, K] as the checkpoint says. ValueError if the packed codes have other rows."""
    N, K = (int(n) for n in module.get("weight_shape", ("i64", "i32"), 2).read())
    if N != words.shape[0] or not 0 < K <= 32 * words.shape[1]:
        raise ValueError(f"tensor {module.full('weight_shape')!r}: [{N}, {K}] is not the shape of {list(words.shape)}")
    return N, K


def _integers(module: Module, schemes: list[Scheme]) -> MadeTensor:
    numbers = module.get("weight", ("i8",), None, None)
    N, K = numbers.shape
    scales = module.get("weight_scale", FLOATS, *_scale_shape(module, N))
    G, symmetric = scales.shape[1] if len(scales.shape) == 2 else 1, not module.has("weight_zero_point")
    _check(numbers.name, Scheme(8, "int", symmetric, K // G, None), schemes, K)
    by_row = lambda tensor: np.broadcast_to(tensor.read().reshape(-1, G), (N, G))
    group_of = group_of_columns(module, "weight_g_idx", K, G)
    if symmetric and is_by_channel(8, G, K):
        return by_channel(module.full("weight"), (N, K), numbers.read, lambda rows: by_row(scales)[rows])
    zeros = None if symmetric else module.get("weight_zero_point", ("i8",), *scales.shape)

    def scales_of(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        zero = 128 if zeros is None else by_row(zeros)[rows].astype(np.int32) + 128
        return zero_based(by_row(scales)[rows], zero)

    codes = lambda rows: numbers.read(rows).view(np.uint8) ^ np.uint8(128)
    return grouped(module.full("weight"), (N, K), 8, G, codes, scales_of, group_of)


def _scale_shape(module: Module, N: int) -> tuple[int | None, ...]:
    """[N, groups], or a single scale."""
    found = module.tensors.info.get(module.full("weight_scale"))
    return (1,) if found is not None and found.shape == (1,) else (N, None)
