"""Tensors as a checkpoint stores them (plain floats or integers, or rows of quantized blocks), and files of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ml_dtypes
import numpy as np

from lockstep.formats import BLOCK_FORMATS, FORMATS
from lockstep.formats.parts.finite import check_finite
from lockstep.weights.mapped import read_array

T = TypeVar("T")
PLAIN_FORMATS: Mapping[str, np.dtype] = {
    **{name: format.stored.block for name, format in FORMATS.items() if not format.is_quantized},
    "f64": np.dtype(np.float64),
    "f8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "f8_e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u64": np.dtype(np.uint64),
    "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
MAX_EXPERTS = 4096  # of a layer
MAX_PARTS = 1 << 18  # tensors that are made of others
MOST_OUTPUTS = 1 << 24  # of a layer, so far as its bias is looked at


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor. shape: logical. num_bytes: as stored."""

    name: str
    format: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as stored.

    Shapes: `shape` is logical, output features first and K last, as Hugging Face has it. `data` is read-only:
    floats and integers in that shape, block formats as uint8 [rows..., bytes per row].
    """

    name: str
    format: str
    shape: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self):
        expected = stored_shape(self.format, self.shape)[0]
        assert self.data.shape == expected, (self.name, self.format, self.shape, self.data.shape, expected)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """A copy of the chosen rows (of the first axis) as stored. ValueError if the file was truncated."""
        return read_array(self.data[rows] if self.shape else self.data)

    def finite_f32(self, rows: slice = slice(None)) -> np.ndarray:
        """`to_f32`. ValueError that names the tensor and the first value that is NaN or infinite."""
        values = self.to_f32(rows)
        check_finite(self, values, rows.start or 0)
        return values

    def to_f32(self, rows: slice = slice(None)) -> np.ndarray:
        """The weights of the chosen rows (of the first axis) as a new float32 array.

        Error: none beyond the format's own definition (float64 is rounded).
        """
        data = self.read(rows)
        if self.format in BLOCK_FORMATS:
            return BLOCK_FORMATS[self.format].dequantize(data)
        return data.astype(np.float32)


def numbers_of(stack: TensorInfo) -> range:
    """The numbers of the matrices of a stack, each of which becomes a tensor. ValueError for too many: an empty stack
    of a small file may have any number."""
    if stack.shape[0] > MAX_EXPERTS:
        raise ValueError(
            f"tensor {stack.name!r} {list(stack.shape)}: a stack of {stack.shape[0]} matrices, at most {MAX_EXPERTS} "
            f"are allowed"
        )
    return range(stack.shape[0])


def bounded(parts: Iterable[T]) -> Iterator[T]:
    """The parts of all tensors, one after the other. ValueError for more than any checkpoint has."""
    for number, part in enumerate(parts):
        if number == MAX_PARTS:
            raise ValueError(f"stacks of more than {MAX_PARTS} matrices in all are not allowed")
        yield part


def is_idle(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor changes nothing wherever it is added: a bias of zeros, as GPTQ's tools write one for layers that
    have none."""
    is_bias = name.endswith(".bias") and len(tensor.shape) == 1 and tensor.shape[0] <= MOST_OUTPUTS
    return is_bias and not tensor.to_f32().any()


@dataclass(frozen=True)
class MadeTensor(StoredTensor):
    """A tensor whose rows are made of other tensors when they are read. data: zeros that take no memory. make: called
    with a slice of rows, returns these as stored."""

    make: Callable[[slice], np.ndarray]

    @classmethod
    def of(cls, name: str, format: str, shape: tuple[int, ...], make: Callable[[slice], np.ndarray]) -> "MadeTensor":
        """The tensor of these rows."""
        stored, dtype = stored_shape(format, shape)
        return cls(name, format, shape, np.broadcast_to(np.zeros(1, dtype), stored), make)

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        return self.make(slice(*rows.indices(self.shape[0])))


class TensorMap(Mapping[str, StoredTensor]):
    """Tensors by Hugging Face name, each loaded when it is looked up.

    Names, shapes and formats (`info`) need no loading.
    """

    def __init__(self, infos: Mapping[str, TensorInfo], load: Callable[[str], StoredTensor]):
        self.info = infos
        self._load = load

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.info:
            raise KeyError(name)
        return self._load(name)

    def __contains__(self, name: object) -> bool:
        return name in self.info

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


@dataclass(frozen=True)
class TensorFile:
    """One mapped file. infos, begins (byte offsets in `raw`): by the file's own tensor names. metadata: of a GGUF file;
    empty for safetensors.
    """

    path: Path
    raw: np.ndarray
    header_hash: str
    metadata: Mapping[str, object]
    infos: Mapping[str, TensorInfo]
    begins: Mapping[str, int]

    def load(self, name: str) -> StoredTensor:
        """One tensor of this file, as a view."""
        info, begin = self.infos[name], self.begins[name]
        return view_tensor(self.raw[begin : begin + info.num_bytes], info)


def merge(files: Sequence[TensorFile]) -> TensorMap:
    """All tensors of several files as one mapping. Raises ValueError if two files hold the same name."""
    home: dict[str, TensorFile] = {}
    for file in files:
        for name in file.infos:
            if name in home:
                raise ValueError(f"tensor {name!r} is in both {home[name].path} and {file.path}")
            home[name] = file
    return TensorMap({name: file.infos[name] for name, file in home.items()}, lambda name: home[name].load(name))


def stored_shape(format: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the array that holds a tensor: its own, or uint8 rows for a block format."""
    if format in PLAIN_FORMATS:
        return shape, PLAIN_FORMATS[format]
    columns = shape[-1] if shape else 1
    return (*shape[:-1], BLOCK_FORMATS[format].row_bytes(columns)), np.dtype(np.uint8)


def view_tensor(raw: np.ndarray, info: TensorInfo) -> StoredTensor:
    """The tensor that `info` describes, as a view of raw bytes uint8 [num_bytes].

    It is copied only if the file places it at an address that its dtype does not allow.
    """
    shape, dtype = stored_shape(info.format, info.shape)
    data = raw.view(dtype)
    if not data.flags.aligned:
        data = data.copy()
    data = data.reshape(shape)
    data.flags.writeable = False
    return StoredTensor(info.name, info.format, info.shape, data)
