"""Activations as integer codes of a grid: the fast kernel. Bound by the read of the rows."""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.numbers import float32
from lockstep.native.simd import (
    bit_xor,
    lane_numbers,
    lanes,
    load,
    max_lanes,
    maximum,
    shift_right,
    store_i8,
    sum_lanes,
    to_f32,
    to_i32,
    where_below,
)
from lockstep.ops.integer.code_rows import (
    CodeRows,
    code_bytes,
    code_shift,
    grid_code,
    num_planes,
    plane_bytes,
    row_grid,
    unknown,
    write_tail,
)
from lockstep.ops.rounded.grids import HIGH, INTEGER, INVERSE, KIND, LOW, ONE, SCALE, UNKNOWN, ZERO, ZERO_POINT
from lockstep.ops.rounded.grids_cpu import range_of, word
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows


@inlined
def within(i, K, value, other):
    """`value` in lanes of values i .. i + 15 that a row of K has; `other` in lanes past its end."""
    return where_below(to_f32(lane_numbers()), float32(K - i), value, other)


@inlined
def store_codes(out, plane, planes, shifted):
    """Stores sixteen shifted codes: whole in one plane; or the upper byte, and the lower byte less 128, in two."""
    if planes == 1:
        store_i8(out, shifted)
    else:
        store_i8(out, shift_right(shifted, 8))
        store_i8(out + plane, bit_xor(shifted, 128))


@inlined
def write_row(x, K, grid, out):
    """Writes the row of codes of the K float32 at an address."""
    kind, low, high, plane = np.int64(word(grid, KIND)), word(grid, LOW), word(grid, HIGH), plane_bytes(K)
    words = word(grid, SCALE), word(grid, INVERSE), word(grid, ZERO_POINT), low, high
    lowest, highest, amax = (ZERO, ZERO, ZERO) if kind == INTEGER else range_of(x, K)
    scale, inverse, zero = row_grid(kind, words, lowest, highest, amax)
    planes, shift = num_planes(low, high), code_shift(low, high)
    padding = 128 * (planes - 1)  # the shifted code whose bytes in all planes are zero
    total, has_nan = to_i32(lanes(ZERO)), lanes(ZERO)
    for i in range(0, K, 16):
        v = within(i, K, load(x + 4 * i), ZERO)
        shifted = to_i32(within(i, K, grid_code(v, inverse, zero, low, high) - shift, float32(padding)))
        total, has_nan = total + shifted, maximum(unknown(v), has_nan)
        store_codes(out + i, plane, planes, shifted)
    lanes_done = (K + 15) // 16 * 16
    if lanes_done < plane:
        store_codes(out + lanes_done, plane, planes, to_i32(lanes(float32(padding))))
    scale = UNKNOWN if max_lanes(has_nan) == ONE else scale
    write_tail(out + 2 * plane, scale, to_i32(zero - shift) - padding, sum_lanes(total) - padding * lanes_done, planes)


@kernel
def code_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = CodeRows.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, False):
        write_row(a.x + 4 * a.width * t, a.width, a.grid, a.out + code_bytes(a.width) * t)


CPU = {"code_rows": Implementation(code_rows)}
