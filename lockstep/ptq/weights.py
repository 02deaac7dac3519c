"""Rounding weights to grids: to nearest, with the full range or the range of least squared error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockstep.formats.q4_0 import Q4_0
from lockstep.formats.q8_0 import Q8_0
from lockstep.native.kernel import native
from lockstep.ops.rounded.grids import HIGH, INVERSE, LOW, SCALE, ZERO_POINT, quantize_row
from lockstep.ptq.ranges import is_constant, set_constant, set_range
from lockstep.ptq.ranges_cpu import search_range
from lockstep.ptq.spec import MSE, Spec

STORED = {format.name: format for format in (Q8_0, Q4_0)}  # stored formats that a plan may name
CODES = (np.int8, np.int16, np.int32)  # types of codes: a grid takes the smallest that holds its codes
CHUNK = 1 << 22  # codes of this many weights are made at once


@dataclass(frozen=True, eq=False)
class Folded:
    """A weight on a grid.

    values: float32 [N, K], the rounded weights. codes: of an integer grid, [N, K] in the smallest of int8, int16 and
    int32 that holds its range; value = (code - zero) * scale in float32. scale, zero: float32 [1, 1] (per tensor),
    [N, 1] (per row) or [N, K / group]; zero is 0 for symmetric grids. None for fields that a grid does not have.
    """

    values: np.ndarray
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None


def fold(values: np.ndarray, spec: Spec, name: str = "weight", factor: float = 1.0) -> Folded:
    """Weights [N, K] float32 on the grid of a spec.

    name: of the weight, for errors. factor: multiplies the scale of a grid of integers or small floats after codes were
    chosen; 1 for other grids.

    ValueError for weights that are not finite and for groups or blocks that do not divide K.
    """
    spec = spec.resolved(is_weight=True)
    if values.ndim != 2 or values.dtype != np.float32 or not values.size:
        raise ValueError(f"{name}: a weight of {values.dtype} {list(values.shape)}, expected float32 [N, K]")
    if spec.is_off:
        return Folded(values)
    if not np.isfinite(values).all():
        num_bad = values.size - int(np.isfinite(values).sum())
        raise ValueError(f"{name}: {num_bad} of {values.size} weights are NaN or infinite; a grid needs finite numbers")
    if spec.grid in STORED:
        return _fold_stored(values, spec, name)
    return _fold_rows(values, spec, name, factor)


def _fold_stored(values: np.ndarray, spec: Spec, name: str) -> Folded:
    """Weights in a stored format, as a file would hold them."""
    _check_width(values.shape[1], spec, spec.what.block, name)
    packing = STORED[spec.grid]
    try:
        return Folded(packing.dequantize(packing.quantize(values)))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_width(width: int, spec: Spec, block: int, name: str) -> None:
    if block and width % block:
        raise ValueError(f"{name}: rows of {width} weights are not a whole number of blocks of {block} ({spec})")


def row_width(spec: Spec, shape: tuple[int, int]) -> int:
    """How many consecutive weights of an [N, K] share a grid."""
    return spec.per if isinstance(spec.per, int) else shape[0] * shape[1] if spec.per == "tensor" else shape[1]


def _fold_rows(values: np.ndarray, spec: Spec, name: str, factor: float) -> Folded:
    """Weights on a grid of `ops.rounded.grids`: weights that share a grid are a row for the definition."""
    group = spec.per if isinstance(spec.per, int) else 0
    _check_width(values.shape[1], spec, group or spec.what.block, name)
    parts = np.array(values, np.float32, order="C")  # a copy, which is rounded in place
    rows = parts.reshape(-1, row_width(spec, (values.shape[0], values.shape[1])))
    grid_rows = np.tile(spec.what.row(), (len(rows), 1))
    if spec.what.has_range:
        _find_ranges(rows, grid_rows, spec.observer == MSE, spec.per == "tensor" and not spec.symmetric)
        if not np.isfinite(grid_rows).all():
            raise ValueError(f"{name}: weights from {values.min():g} to {values.max():g} have no scale in float32")
    codes = _codes(rows, grid_rows).reshape(values.shape) if spec.what.is_integer else None
    grid_rows[:, SCALE] *= np.float32(factor)  # not its inverse, from which codes are computed
    _round(parts if spec.what.block else rows, grid_rows)
    if not spec.what.has_range:
        return Folded(parts, codes)
    shape = (len(values) if spec.per != "tensor" else 1, -1)
    zero = grid_rows[:, ZERO_POINT].reshape(shape) if spec.what.is_integer else None
    return Folded(parts, codes, grid_rows[:, SCALE].reshape(shape), zero)


@native
def _find_ranges(rows, grid_rows, is_searched, has_constant):
    """Sets scale and zero point of each grid in grid_rows [n, GRID_WORDS] to fit its row of float32 [n, width].

    is_searched: find the range of least squared error. has_constant: see `ranges.set_constant`.
    """
    for i in range(rows.shape[0]):
        lowest, highest = rows[i].min(), rows[i].max()
        if has_constant and is_constant(lowest, highest):
            set_constant(grid_rows[i], lowest)
        elif is_searched:
            search_range(grid_rows[i], lowest, highest, rows[i].ctypes.data, 0, rows.shape[1])
        else:
            set_range(grid_rows[i], lowest, highest)


@native
def _round(rows, grid_rows):
    """Rounds each row, in place, to its grid in grid_rows, or all rows to the only grid."""
    for i in range(rows.shape[0]):
        quantize_row(rows[i], grid_rows[i if grid_rows.shape[0] > 1 else 0])


def _codes(rows: np.ndarray, grid_rows: np.ndarray) -> np.ndarray:
    """The codes of rows on integer grids, by the same float32 operations as in `grids.on_integers`."""
    low, high = int(grid_rows[0, LOW]), int(grid_rows[0, HIGH])
    dtype = next(each for each in CODES if np.iinfo(each).min <= low and high <= np.iinfo(each).max)
    codes, step = np.empty(rows.shape, dtype), max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        part, grid = rows[start : start + step], grid_rows[start : start + step]
        whole = np.rint(part * grid[:, INVERSE, None]) + grid[:, ZERO_POINT, None]
        codes[start : start + step] = whole.clip(low, high)
    return codes


# ------------------------------------------------------------ bytes

SCALE_BYTES, BLOCK_SCALE_BYTES = 4, 1  # float32; e8m0 or e4m3


def num_bytes(spec: Spec, shape: tuple[int, int]) -> int:
    """Bytes of a weight [N, K] on a grid: packed codes, float32 scales, and zero points as wide as a code."""
    spec = spec.resolved(is_weight=True)
    size, grid = shape[0] * shape[1], spec.what
    if spec.grid in STORED:
        packing = STORED[spec.grid]
        return shape[0] * packing.row_bytes(shape[1])
    num_ranges = size // row_width(spec, shape) if grid.has_range else 0
    bits = size * grid.bits + (num_ranges * grid.bits if grid.is_integer and not grid.symmetric else 0)
    blocks = shape[0] * -(-shape[1] // grid.block) if grid.block else 0
    return -(-bits // 8) + SCALE_BYTES * num_ranges + BLOCK_SCALE_BYTES * blocks
