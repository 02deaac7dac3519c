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
def before(i, K, value, other):
    """value in the lanes that are numbers i .. i + 15 of a row of K; the other after its end."""
    return where_below(to_f32(lane_numbers()), float32(K - i), value, other)


@inlined
def store_codes(out, plane, planes, a):
    """Sixteen codes in one plane or two: whole, or the upper byte and the lower less 128."""
    if planes == 1:
        store_i8(out, a)
    else:
        store_i8(out, shift_right(a, 8))
        store_i8(out + plane, bit_xor(a, 128))


@inlined
def write_row(x, K, grid, out):
    """Writes the row of codes of the K float32 at an address."""
    kind, low, high, plane = np.int64(word(grid, KIND)), word(grid, LOW), word(grid, HIGH), plane_bytes(K)
    words = word(grid, SCALE), word(grid, INVERSE), word(grid, ZERO_POINT), low, high
    lowest, highest, amax = (ZERO, ZERO, ZERO) if kind == INTEGER else range_of(x, K)
    scale, inverse, zero = row_grid(kind, words, lowest, highest, amax)
    planes, shift = num_planes(low, high), code_shift(low, high)
    added = 128 * (planes - 1)  # a of which both planes are zero
    total, spoilt = to_i32(lanes(ZERO)), lanes(ZERO)
    for i in range(0, K, 16):
        v = before(i, K, load(x + 4 * i), ZERO)
        a = to_i32(before(i, K, grid_code(v, inverse, zero, low, high) - shift, float32(added)))
        total, spoilt = total + a, maximum(unknown(v), spoilt)
        store_codes(out + i, plane, planes, a)
    lanes_done = (K + 15) // 16 * 16
    if lanes_done < plane:
        store_codes(out + lanes_done, plane, planes, to_i32(lanes(float32(added))))
    scale = UNKNOWN if max_lanes(spoilt) == ONE else scale
    write_tail(out + 2 * plane, scale, to_i32(zero - shift) - added, sum_lanes(total) - added * lanes_done, planes)


@kernel
def code_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = CodeRows.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, False):
        write_row(a.x + 4 * a.width * t, a.width, a.grid, a.out + code_bytes(a.width) * t)


CPU = {"code_rows": Implementation(code_rows)}
