"""Undoing what conversion to GGUF did to a tensor, so that it is again as in the Hugging Face checkpoint.

Each class tells the tensor's format and shape afterwards (`info`, without reading it) and does the work (`apply`).
Source: conversion/llama.py and conversion/qwen.py of llama.cpp (modify_tensors).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from lockstep.formats.mxfp4 import MXFP4, from_pairs
from lockstep.weights import decimals
from lockstep.weights.tensor import BLOCK_FORMATS, MadeTensor, StoredTensor, TensorInfo, stored_shape


class Undo:
    """Undoes nothing: the tensor is stored as in the Hugging Face checkpoint."""

    def info(self, info: TensorInfo) -> TensorInfo:
        """The tensor's format and Hugging Face shape after `apply`."""
        return info

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        """The tensor as in the Hugging Face checkpoint."""
        return tensor


class OneRow(Undo):
    """A vector [K] as a matrix of one row, [1, K]."""

    def info(self, info: TensorInfo) -> TensorInfo:
        if math.prod(info.shape[:-1]) != 1:
            raise ValueError("expected one row")
        return replace(info, shape=(1, *info.shape[-1:]))

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        return replace(tensor, shape=(1, *tensor.shape[-1:]), data=tensor.data.reshape(1, -1))


@dataclass(frozen=True)
class HalfSplitRows(Undo):
    """Moves the rows of rotary pairs, adjacent (2i, 2i + 1) in GGUF, back to half a head apart."""

    num_heads: int

    def info(self, info: TensorInfo) -> TensorInfo:
        return _of_whole_rows(info)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        if self.num_heads < 1 or tensor.shape[0] % (2 * self.num_heads):
            raise ValueError(f"expected pairs of rows of {self.num_heads} heads, found {tensor.shape[0]} rows")
        rows = np.arange(tensor.shape[0])
        return _take_rows(tensor, rows.reshape(self.num_heads, -1, 2).swapaxes(1, 2).ravel())


@dataclass(frozen=True)
class ValueHeads:
    """The order of the delta rule's value heads. Hugging Face has them grouped by key head: all of the first key head,
    then all of the second; GGUF has the first value head of every key head, then the second of every key head."""

    num_key_heads: int
    num_value_heads: int

    def order(self, length: int) -> np.ndarray:
        """For each Hugging Face position along an axis of `length`, its position in GGUF."""
        if length % self.num_value_heads:
            raise ValueError(f"expected a multiple of {self.num_value_heads} value heads, found {length}")
        per_key = self.num_value_heads // self.num_key_heads
        return np.arange(length).reshape(per_key, self.num_key_heads, -1).swapaxes(0, 1).ravel()


@dataclass(frozen=True)
class GroupedRows(Undo):
    """Puts value heads back into groups along the first axis, from row `first` on (q and k are before)."""

    heads: ValueHeads
    first: int = 0

    def info(self, info: TensorInfo) -> TensorInfo:
        return _of_whole_rows(info)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        if tensor.shape[0] < self.first:
            raise ValueError(f"expected at least {self.first} rows")
        order = self.first + self.heads.order(tensor.shape[0] - self.first)
        return _take_rows(tensor, np.concatenate([np.arange(self.first), order]))


@dataclass(frozen=True)
class GroupedColumns(Undo):
    """Puts value heads back into groups along K: whole blocks move. Where a block spans heads, nothing can move."""

    heads: ValueHeads

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        _check_matrix(tensor.shape)
        if tensor.format not in BLOCK_FORMATS:
            return _with_data(tensor, tensor.read().take(self.heads.order(tensor.shape[-1]), axis=1))
        block = BLOCK_FORMATS[tensor.format]
        blocks = tensor.read().reshape(len(tensor.data), -1, block.block_bytes)
        moved = blocks[:, self.heads.order(blocks.shape[1])].reshape(tensor.data.shape)
        return _with_data(tensor, moved)


class MinusOne(Undo):
    """Subtracts 1 from a norm stored as s = 1 + w.

    Error: none, and 1 + w in float32 gives s again, where s is 0.5 to 2^24 or the sum of 1 and a float32. Any other
    s, as blocks may hold, is off by at most half the spacing of float32 at s - 1: 2^-25 from 0 to 0.5.
    """

    def info(self, info: TensorInfo) -> TensorInfo:
        return _as_f32(info)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        return _f32(tensor, tensor.to_f32() - np.float32(1))


@dataclass(frozen=True)
class DecayLog(Undo):
    """A_log from the stored -exp(A_log).

    Checkpoints keep A_log in bfloat16, so the nearest bfloat16 is taken where its exponential is the stored
    value (within the error of a float32 exp), which makes the round trip exact; otherwise the float32 logarithm.
    """

    heads: ValueHeads

    def info(self, info: TensorInfo) -> TensorInfo:
        return _as_f32(info)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        decays = -tensor.to_f32()
        wrong = decays[~((decays > 0) & (decays < np.inf))]
        if wrong.size:
            raise ValueError(
                f"tensor {tensor.name!r}: expected -exp(A_log), all negative and finite, found {-wrong[0]}"
            )
        logs = np.array([_snapped_log(decay) for decay in decays.tolist()], np.float32)
        return _f32(tensor, logs[self.heads.order(len(logs))])


@dataclass(frozen=True)
class ConvChannels(Undo):
    """Convolution weights [channels, kernel] as [channels, 1, kernel], with the channels of value heads in groups."""

    heads: ValueHeads
    first: int

    def info(self, info: TensorInfo) -> TensorInfo:
        channels, kernel = _check_matrix(info.shape)
        return replace(info, shape=(channels, 1, kernel))

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        channels, kernel = tensor.shape
        grouped = GroupedRows(self.heads, self.first).apply(tensor).data
        return StoredTensor(tensor.name, tensor.format, (channels, 1, kernel), grouped.reshape(channels, 1, -1))


@dataclass(frozen=True)
class Expert(Undo):
    """One expert's matrix, as a view of the stack [experts, rows, K]."""

    index: int

    def info(self, info: TensorInfo) -> TensorInfo:
        return replace(info, shape=info.shape[1:], num_bytes=info.num_bytes // info.shape[0])

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        return StoredTensor(tensor.name, tensor.format, tensor.shape[1:], tensor.data[self.index])


@dataclass(frozen=True)
class Times(Undo):
    """Another one, and then the weights times the factor that the file has beside them: for all, or for each expert."""

    undo: Undo
    factors: StoredTensor

    def info(self, info: TensorInfo) -> TensorInfo:
        info = self.undo.info(info)
        format = self._format_of(info)
        shape, dtype = stored_shape(format, info.shape)
        return replace(info, format=format, num_bytes=math.prod(shape) * dtype.itemsize)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        tensor, factor = self.undo.apply(tensor), self._factor()
        if tensor.format not in BLOCK_FORMATS:
            return _f32(tensor, tensor.to_f32() * factor)
        format, rows_of = self._times(tensor.format)
        return MadeTensor.of(tensor.name, format, tensor.shape, lambda rows: rows_of(tensor.read(rows), factor))

    def _format_of(self, info: TensorInfo) -> str:
        return self._times(info.format)[0] if info.format in BLOCK_FORMATS else "f32"

    @staticmethod
    def _times(format: str) -> tuple[str, Callable[[np.ndarray, np.float32], np.ndarray]]:
        times = BLOCK_FORMATS[format].times
        assert times is not None, format
        return times

    def _factor(self) -> np.float32:
        undos = self.undo.undos if isinstance(self.undo, Chain) else (self.undo,)
        factors, index = self.factors.finite_f32(), next((u.index for u in undos if isinstance(u, Expert)), 0)
        if factors.ndim != 1 or (factors.size != 1 and index >= factors.size):
            raise ValueError(
                f"tensor {self.factors.name!r} {list(factors.shape)}: expected one factor, or one an expert"
            )
        return factors[index if factors.size > 1 else 0]


@dataclass(frozen=True)
class Rows(Undo):
    """Rows `start` to `stop` - 1, as a view: one of the projections that are one tensor."""

    start: int
    stop: int

    def info(self, info: TensorInfo) -> TensorInfo:
        shape = (self.stop - self.start, *info.shape[1:])
        return replace(info, shape=shape, num_bytes=info.num_bytes // info.shape[0] * shape[0])

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        data = tensor.data[self.start : self.stop]
        return StoredTensor(tensor.name, tensor.format, (len(data), *tensor.shape[1:]), data)


@dataclass(frozen=True)
class EveryOther(Undo):
    """Rows (or, of biases [experts, outputs], columns) first, first + 2, ... of the two that alternate."""

    first: int
    columns: bool = False

    def info(self, info: TensorInfo) -> TensorInfo:
        return replace(info, shape=self._half(info.shape), num_bytes=info.num_bytes // 2)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        def make(rows: slice) -> np.ndarray:
            if self.columns:
                return tensor.read(rows)[:, self.first :: 2]
            start, stop, _ = rows.indices(tensor.shape[0] // 2)
            return tensor.read(slice(2 * start, 2 * stop))[self.first :: 2]

        return MadeTensor.of(tensor.name, tensor.format, self._half(tensor.shape), make)

    def _half(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] // 2) if self.columns else (shape[0] // 2, *shape[1:])


class FromPairs(Undo):
    """MXFP4 whose bytes hold two neighbours, as Hugging Face has them: bytes [..., K / 32 * 17], scale before codes."""

    def info(self, info: TensorInfo) -> TensorInfo:
        shape = (*info.shape[:-1], info.shape[-1] // MXFP4.block_bytes * MXFP4.block_size)
        return replace(info, format=MXFP4.name, shape=shape)

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        def make(rows: slice) -> np.ndarray:
            stored = tensor.read(rows)
            blocks = stored.reshape(-1, stored.shape[-1] // MXFP4.block_bytes, MXFP4.block_bytes)
            return from_pairs(blocks[..., 1:], blocks[..., 0]).reshape(stored.shape)

        shape = (*tensor.shape[:-1], tensor.shape[-1] // MXFP4.block_bytes * MXFP4.block_size)
        return MadeTensor.of(tensor.name, MXFP4.name, shape, make)


@dataclass(frozen=True)
class Chain(Undo):
    """One after the other."""

    undos: tuple[Undo, ...]

    def info(self, info: TensorInfo) -> TensorInfo:
        for undo in self.undos:
            info = undo.info(info)
        return info

    def apply(self, tensor: StoredTensor) -> StoredTensor:
        for undo in self.undos:
            tensor = undo.apply(tensor)
        return tensor


def _check_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape; ValueError unless it is that of a matrix."""
    if len(shape) != 2:
        raise ValueError(f"expected a matrix, found {len(shape)} dimensions")
    return shape


def _snapped_log(decay: float) -> float:
    log = decimals.log(decay)
    snapped = float(ml_dtypes.bfloat16(log))
    tolerance = 4 * float(np.spacing(np.float32(decay)))
    return snapped if abs(decimals.exp(snapped) - decay) <= tolerance else log


def _of_whole_rows(info: TensorInfo) -> TensorInfo:
    """The info after rows were moved. Rows of blocks move as they are; a vector of blocks becomes float32."""
    return _as_f32(info) if info.format in BLOCK_FORMATS and len(info.shape) == 1 else info


def _take_rows(tensor: StoredTensor, order: np.ndarray) -> StoredTensor:
    if tensor.format in BLOCK_FORMATS and len(tensor.shape) == 1:
        return _f32(tensor, tensor.to_f32().take(order))
    return _with_data(tensor, tensor.read().take(order, axis=0))


def _with_data(tensor: StoredTensor, data: np.ndarray) -> StoredTensor:
    data.flags.writeable = False
    return replace(tensor, data=data)


def _f32(tensor: StoredTensor, data: np.ndarray) -> StoredTensor:
    data.flags.writeable = False
    return StoredTensor(tensor.name, "f32", tensor.shape, data)


def _as_f32(info: TensorInfo) -> TensorInfo:
    shape, dtype = stored_shape("f32", info.shape)
    return replace(info, format="f32", num_bytes=math.prod(shape) * dtype.itemsize)
