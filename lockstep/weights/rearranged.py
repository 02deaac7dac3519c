"""Tensors that are others in another order: a stack as one matrix; a matrix of a stack, transposed; chosen rows;
sorted columns, put back."""

from dataclasses import dataclass, replace

import numpy as np

from lockstep.weights.tensor import PLAIN_FORMATS, MadeTensor, StoredTensor


def flattened(stack: StoredTensor) -> StoredTensor:
    """A stack [matrices, rows, K] as one matrix [matrices * rows, K]."""
    count, height = stack.shape[0] * stack.shape[1], stack.shape[1]
    shape, data = (count, *stack.shape[2:]), stack.data.reshape(count, -1)
    if not isinstance(stack, MadeTensor):
        return replace(stack, shape=shape, data=data)

    def read(rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(count)
        first = start // height
        whole = stack.read(slice(first, -(-stop // height))).reshape(-1, data.shape[1])
        return whole[start - first * height : stop - first * height]

    return MadeTensor.of(stack.name, stack.format, shape, read)


def transposed(stack: StoredTensor, index: int) -> MadeTensor:
    """Matrix number `index` of a stack [matrices, K, N], as [N, K]. ValueError for a stack of blocks."""
    if stack.format not in PLAIN_FORMATS:
        raise ValueError(f"tensor {stack.name!r}: {stack.format} blocks cannot be transposed")
    read = lambda rows: np.ascontiguousarray(stack.read(slice(index, index + 1))[0].T[rows])
    return MadeTensor.of(f"{stack.name}.{index}", stack.format, (stack.shape[2], stack.shape[1]), read)


def gathered(whole: StoredTensor, name: str, order: np.ndarray) -> MadeTensor:
    """The rows `order` [rows] of a tensor, in this order and under this name."""
    read = lambda rows: np.concatenate([whole.read(run) for run in _runs(order[rows])])
    return MadeTensor.of(name, whole.format, (len(order), *whole.shape[1:]), read)


@dataclass(frozen=True)
class ScatteredColumns(MadeTensor):
    """A matrix in float32 that another tensor has with sorted columns, in a format that has no room for them unsorted.

    sorted: that tensor, whose column i is column order[0, i] of this one; order: int32 [1, K]. Whoever multiplies with
    rows whose columns are in this order may take `sorted`; for all others this is a matrix of float32.
    """

    sorted: StoredTensor
    order: StoredTensor


def scattered_columns(sorted: StoredTensor, order: np.ndarray) -> ScatteredColumns:
    """The matrix whose columns `order` [K], in this order, are a tensor [N, K]."""
    place = np.argsort(order)
    made = MadeTensor.of(sorted.name, "f32", sorted.shape, lambda rows: np.take(sorted.to_f32(rows), place, axis=1))
    columns = order.astype(np.int32).reshape(1, -1)
    order_tensor = StoredTensor(f"{sorted.name}.order", "i32", columns.shape, columns)
    return ScatteredColumns(**vars(made), sorted=sorted, order=order_tensor)


def _runs(order: np.ndarray) -> list[slice]:
    """Runs of rows that lie together, in order; order: at least one row."""
    ends = np.flatnonzero(np.diff(order, append=-2) != 1) + 1
    starts = np.concatenate([[0], ends[:-1]])
    return [slice(int(order[a]), int(order[b - 1]) + 1) for a, b in zip(starts, ends, strict=True)]


def half_split(whole: StoredTensor, num_heads: int) -> MadeTensor:
    """A matrix of rotary heads whose pairs of rows lie side by side, (2i, 2i + 1), with these half a head apart.

    ValueError for a number of rows that are not pairs of this many heads.
    """
    num_rows = whole.shape[0] if whole.shape else 0
    if type(num_heads) is not int or num_heads < 1 or not num_rows or num_rows % (2 * num_heads):
        raise ValueError(f"tensor {whole.name!r}: {list(whole.shape)} are no pairs of rows of {num_heads!r:.20} heads")
    order = np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).ravel()

    def make(rows: slice) -> np.ndarray:
        wanted = order[rows]
        first = int(wanted.min())
        return whole.read(slice(first, int(wanted.max()) + 1))[wanted - first]

    return MadeTensor.of(whole.name, whole.format, whole.shape, make)
