"""Activations as integer codes of a grid, which integer linear layers multiply exactly: the definition.

    code = clamp(rint(x * (1 / scale)) + zero, low, high)          value = (code - zero) * scale

The grid is one of the kinds INTEGER, ROW_SYMMETRIC and ROW_ASYMMETRIC of `ops/rounded/grids.py`, and the values are
those to which `fake_quant` rounds. The grid is read when the op runs: another grid is other numbers in memory, and
nothing is compiled again.

A row of codes is two planes of int8 and a tail of 16 bytes, so that a kernel needs one pointer a row. A plane is as
long as the row, with zeros up to a multiple of 32. Grids of at most 256 codes use the first plane only.
    one plane     a = code - shift, an int8: first
    two planes    a = code - shift, an int16: 256 * first + second + 128
    tail          float32 scale | int32 zero | int32 sum | int32 number of planes
zero and sum correct the sums of products of planes to those of codes, see `exact` in `ops/integer/code_tile.py`:
    one plane     zero = zero point - shift             sum = the sum of a
    two planes    zero = zero point - shift - 128       sum = the sum of (a - 128)
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import byte_array, float_array
from lockstep.native.numbers import carray, float32, int32, int64
from lockstep.native.simd import maximum, minimum, peek, poke, rint, to_i32, where_below
from lockstep.ops.rounded.grids import (
    GRID_WORDS,
    HIGH,
    INFINITY,
    INTEGER,
    INVERSE,
    KIND,
    LOW,
    ONE,
    ROW_ASYMMETRIC,
    ROW_SYMMETRIC,
    SCALE,
    UNKNOWN,
    ZERO,
    ZERO_POINT,
    asymmetric_scale,
    largest_size,
    symmetric_scale,
)
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows, setting
from lockstep.runtime.program import Setting, Tensor
from lockstep.runtime.step import num_rows

BLOCK, TAIL_BYTES = 32, 16
TAIL_SCALE, TAIL_ZERO, TAIL_SUM, TAIL_PLANES = 0, 4, 8, 12  # bytes into a tail
MINUS_INFINITY = np.float32(-np.inf)
MOST_OF_A_PLANE, INT8_END, INT16_END = np.float32(255), np.float32(128), np.float32(32768)


@inlined
def plane_bytes(num_values):
    """Bytes of a plane of num_values codes."""
    return (num_values + BLOCK - 1) // BLOCK * BLOCK


@inlined
def code_bytes(num_values):
    """Bytes of a row of num_values codes."""
    return 2 * ((num_values + BLOCK - 1) // BLOCK * BLOCK) + TAIL_BYTES


def row_width(num_values: int) -> int:
    """Width of an i8 tensor whose rows hold num_values codes each."""
    return code_bytes.py_func(num_values)


class CodeRows(Operands):
    """out i8 [rows, row_width(width)] = the rows of x [rows, width] as codes of a grid.

    grid: an integer grid of at most 65536 codes, its zero point one of them. A row that has a value which `fake_quant`
    would make NaN has the scale NaN, so that every product with the row is NaN. On a grid of another kind every row
    has the scale NaN.
    """

    group = "linear"
    out: Tensor = output(dtype="i8")
    x: Tensor = rows("width")
    grid: Setting = setting(f"1, {GRID_WORDS}")
    width: int

    def check(self):
        check_codes(self, "out", self.width)


def check_codes(op: Operands, name: str, num_values: int) -> None:
    """ValueError unless an op's operand is rows of num_values codes."""
    tensor = getattr(op, name)
    if (tensor.dtype, tensor.width) != ("i8", row_width(num_values)):
        raise ValueError(
            f"{type(op).__name__}: {name} is {tensor}, expected i8[{tensor.rows}, {row_width(num_values)}]"
        )


@inlined
def num_planes(low, high):
    """How many planes the codes of a grid take."""
    return 1 if high - low <= MOST_OF_A_PLANE else 2


@inlined
def code_shift(low, high):
    """The shift that brings codes low .. high into int8, or more than 256 codes into int16; 0 where they fit as is."""
    end = INT8_END if high - low <= MOST_OF_A_PLANE else INT16_END
    return ZERO if -end <= low and high < end else low + end


@inlined
def row_grid(kind, grid, lowest, highest, amax):
    """(scale, 1 / scale, zero) for a row on a grid (scale, 1 / scale, zero, low, high) of a kind.

    lowest, highest, amax: smallest, largest and largest absolute value of the row and 0; amax is infinite if a value is
    not finite. (NaN, 0, 0) for a scale that is not finite.
    """
    scale, inverse, zero, low, high = grid
    if kind == ROW_SYMMETRIC:
        scale, zero = symmetric_scale(amax, high), ZERO
    elif kind == ROW_ASYMMETRIC:
        scale, zero = asymmetric_scale(lowest, highest, low, high)
        scale = scale if amax < INFINITY else amax
    elif kind != INTEGER:
        scale = INFINITY
    if kind != INTEGER:
        inverse = ONE / scale
    return (scale, inverse, zero) if scale < INFINITY else (UNKNOWN, ZERO, ZERO)


@inlined
def grid_code(x, inverse, zero, low, high):
    """The code of a number, as float32; the highest code for NaN."""
    return maximum(minimum(rint(x * inverse) + zero, high), low)


@inlined
def unknown(x):
    """1 for NaN, else 0."""
    return where_below(x, INFINITY, ZERO, where_below(MINUS_INFINITY, x, ZERO, ONE))


@definition
def code_row(x_K, grid, first_P, second_P):
    """Codes of a row in one plane or two; returns the four fields of the tail.

    Shapes: x [K] float32; grid [GRID_WORDS] float32; planes [K up to a multiple of 32] int8, the second unused if one
      suffices.
    Error: half a scale within the grid's range.
    Order: rint(x * (1 / scale)) + zero, in float32 with ties to even, then the clamp.
    Source: the fake quantization of PyTorch, y = (code - zero) * scale.
    """
    lowest, highest, low, high = ZERO, ZERO, grid[LOW], grid[HIGH]
    for k in range(x_K.size):
        lowest, highest = minimum(x_K[k], lowest), maximum(x_K[k], highest)
    words = grid[SCALE], grid[INVERSE], grid[ZERO_POINT], low, high
    scale, inverse, zero = row_grid(int(grid[KIND]), words, lowest, highest, largest_size(x_K))
    planes, shift = num_planes(low, high), to_i32(code_shift(low, high))
    first_P[:], total = 0, 0
    if planes == 2:
        second_P[:] = 0
    for k in range(x_K.size):
        shifted = to_i32(grid_code(x_K[k], inverse, zero, low, high)) - shift
        total += shifted
        first_P[k] = shifted if planes == 1 else shifted >> 8
        if planes == 2:
            second_P[k] = (shifted & 255) - 128
        if unknown(x_K[k]) == ONE:
            scale = UNKNOWN
    offset = 128 * (planes - 1)
    return scale, to_i32(zero) - shift - offset, total - offset * x_K.size, planes


@inlined
def write_tail(tail, scale, zero, total, planes):
    """Writes the tail of a row of codes."""
    poke(tail + TAIL_SCALE, float32(scale))
    poke(tail + TAIL_ZERO, int32(zero))
    poke(tail + TAIL_SUM, int32(total))
    poke(tail + TAIL_PLANES, int32(planes))


@inlined
def tail_of(row, num_values):
    """(scale, zero, number of planes) of the row of codes at an address."""
    tail = row + 2 * plane_bytes(num_values)
    return peek(tail + TAIL_SCALE, float32), int64(peek(tail + TAIL_ZERO, int32)), peek(tail + TAIL_PLANES, int32)


@kernel
def _run(op, step, thread, num_threads):
    a = CodeRows.read(op)
    grid, plane = carray(float_array(a.grid), (GRID_WORDS,)), plane_bytes(a.width)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        out = a.out + code_bytes(a.width) * t
        planes = carray(byte_array(out), (plane,)), carray(byte_array(out + plane), (plane,))
        tail = code_row(carray(float_array(a.x + 4 * a.width * t), (a.width,)), grid, planes[0], planes[1])
        write_tail(out + 2 * plane, tail[0], tail[1], tail[2], tail[3])


REFERENCE = {"code_rows": Implementation(_run)}
