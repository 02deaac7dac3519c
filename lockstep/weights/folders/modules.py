"""Quantized linear layers of a folder: their tensors, checked by name, dtype, shape, and the weights made of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lockstep.formats.groups.rows import BY_CHANNEL, SMALLEST_GROUP, format_of, rows_by_channel, stored_rows
from lockstep.weights.rearranged import ScatteredColumns, scattered_columns
from lockstep.weights.tensor import MadeTensor, StoredTensor, TensorInfo, TensorMap

FLOATS = ("f32", "f16", "bf16")
WORDS = ("i32", "u32")
Scales = Callable[[slice], tuple[np.ndarray, np.ndarray]]  # of rows: float32 d and m [rows, groups]


class Module(NamedTuple):
    """The tensors of one layer: `name`.qweight and so on."""

    tensors: TensorMap
    name: str

    def full(self, suffix: str) -> str:
        return f"{self.name}.{suffix}"

    def has(self, suffix: str) -> bool:
        return self.full(suffix) in self.tensors

    def get(self, suffix: str, formats: Iterable[str], *shape: int | None) -> StoredTensor:
        """A tensor of one of these formats and of this shape, where None stands for any size."""
        name = self.full(suffix)
        if name not in self.tensors:
            raise ValueError(f"tensor {name!r} is missing from the checkpoint")
        tensor = self.tensors[name]
        fits = len(tensor.shape) == len(shape) and all(a in (None, b) for a, b in zip(shape, tensor.shape, strict=True))
        if tensor.format not in formats or not fits or 0 in tensor.shape:
            expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
            raise ValueError(
                f"tensor {name!r}: expected {' or '.join(formats)} {expected}, found {tensor.format} "
                f"{list(tensor.shape)}"
            )
        return tensor


def modules_with(tensors: TensorMap, suffix: str) -> list[Module]:
    """The layers that have a tensor of this name."""
    return [Module(tensors, name.removesuffix(f".{suffix}")) for name in tensors if name.endswith(f".{suffix}")]


def is_by_channel(bits: int, groups: int, K: int) -> bool:
    """Whether codes of `bits` bits without zero points, in `groups` groups of a row, are weights of `by_channel`."""
    return bits == 8 and groups == 1 and BY_CHANNEL.fits(K)


def by_channel(name: str, shape: tuple[int, int], codes: Callable, scales: Callable) -> MadeTensor:
    """The weight [N, K] of signed codes of 8 bits and a scale for each row. codes, scales: of rows, int8 [rows, K] and
    numbers [rows, 1]."""
    made = lambda rows: rows_by_channel(codes(rows), scales(rows).astype(np.float32))
    return MadeTensor.of(name, BY_CHANNEL.name, shape, made)


def grouped(
    name: str,
    shape: tuple[int, int],
    bits: int,
    groups: int,
    codes: Callable,
    scales: Scales,
    group_of: np.ndarray | None = None,
) -> MadeTensor:
    """The weight [N, K] of codes of `bits` bits and `groups` groups in a row. codes: of rows, uint8 [rows, K].
    group_of: the group of each column, int [K]; None: group n has the n-th run of columns.

    Where groups are other than runs, the weight is float32: one of ScatteredColumns, if groups are whole.
    """
    if groups < 1 or shape[1] % groups:
        raise ValueError(f"tensor {name!r}: rows of {shape[1]} weights are not {groups} whole groups")
    run_of = np.arange(shape[1]) // (shape[1] // groups)
    if group_of is None or (group_of == run_of).all():
        return _in_runs(name, shape, bits, groups, codes, scales)
    order = np.argsort(group_of, kind="stable")
    if (group_of[order] == run_of).all() and shape[1] // groups % SMALLEST_GROUP == 0:
        by_group = lambda rows: np.take(codes(rows), order, axis=1)
        return scattered_columns(_in_runs(name, shape, bits, groups, by_group, scales), order)
    return MadeTensor.of(name, "f32", shape, lambda rows: _scattered(codes(rows), *scales(rows), group_of))


def _in_runs(name: str, shape: tuple[int, int], bits: int, groups: int, codes: Callable, scales: Scales) -> MadeTensor:
    """The weight of groups that are runs of columns. ValueError for groups that no format has room for."""
    try:
        format = format_of(bits, shape[1] // groups)
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from None
    return MadeTensor.of(name, format.name, shape, lambda rows: stored_rows(format, codes(rows), *scales(rows)))


def _scattered(codes: np.ndarray, d: np.ndarray, m: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """d * q + m, float32 [rows, K], of groups that no format has room for. Error: none, as both terms have 20 bits at
    most."""
    return d[:, group_of] * codes.astype(np.float32) + m[:, group_of]


def group_of_columns(module: Module, suffix: str, K: int, groups: int) -> np.ndarray | None:
    """The group of each column, int [K]; None without a tensor that says it. ValueError for a group that does not
    exist."""
    if not module.has(suffix):
        return None
    group_of = module.get(suffix, ("i32", "i64"), K).read()
    if group_of.min() < 0 or group_of.max() >= groups:
        raise ValueError(
            f"tensor {module.full(suffix)!r}: expected groups 0 to {groups - 1}, found {group_of.min()} to "
            f"{group_of.max()}"
        )
    return group_of


def zero_based(scale: np.ndarray, zero: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """d and m of weights scale * (q - zero): exact, as scales have 11 bits at most and zero points 9."""
    scale = scale.astype(np.float32)
    return scale, -(scale * np.asarray(zero, np.float32))


def unpacked(words: np.ndarray, bits: int, num: int) -> np.ndarray:
    """The first `num` codes of each row of words int32 [rows, n]: code k at bit k * bits, lowest first, as uint8."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        codes = raw
    elif bits in (2, 4):
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (raw[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)
    else:
        each = np.unpackbits(raw, axis=1, bitorder="little")
        each = each[:, : num * bits].reshape(len(raw), num, bits)
        codes = np.packbits(each, axis=2, bitorder="little")[..., 0]
    return codes[:, :num]


def num_words(num: int, bits: int) -> int:
    """32-bit words that hold `num` codes of `bits` bits."""
    return -(-num * bits // 32)


class LastRead:
    """Reads whole tensors, and keeps the last one: of those whose rows are columns of what is stored."""

    def __init__(self) -> None:
        self._last: tuple[str, np.ndarray] = "", np.empty(0)

    def read(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor as stored."""
        name, array = self._last
        if name != tensor.name:
            array = tensor.read()
            self._last = tensor.name, array
        return array


def replaced(tensors: TensorMap, made: Iterable[StoredTensor], dropped: Iterable[str]) -> TensorMap:
    """The tensors without those that are dropped, and with those that were made of them."""
    gone, by_name = set(dropped), {tensor.name: tensor for tensor in made}
    infos: Mapping[str, TensorInfo] = {name: info for name, info in tensors.info.items() if name not in gone}
    infos |= {name: _info(tensor) for name, tensor in by_name.items()}
    return TensorMap(infos, lambda name: by_name[name] if name in by_name else tensors[name])


def _info(tensor: StoredTensor) -> TensorInfo:
    """What a header would say of a tensor that was made."""
    kept = tensor.sorted if isinstance(tensor, ScatteredColumns) else tensor
    return TensorInfo(tensor.name, kept.format, kept.shape, kept.data.nbytes)
