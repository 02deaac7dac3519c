"""Elementwise work on one row of float32 by address, sixteen lanes at a time; the rest of a row one by one.

Nothing is stored past the end of a row: another thread may own that memory.
"""

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.numbers import float32
from lockstep.native.simd import (
    lane_numbers,
    lanes,
    load,
    max_lanes,
    maximum,
    peek,
    poke,
    store,
    sum_lanes,
    to_f32,
    where_below,
)
from lockstep.ops.math import ZERO, exp, sigmoid

LOWEST = np.float32(-np.inf)


@inlined
def copy_row(x, num_values, out):
    """out = x."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(out + i, load(x + i))
    for i in range(4 * whole, 4 * num_values, 4):
        poke(out + i, peek(x + i, float32))


@inlined
def scale_row(x, num_values, factor, out):
    """out = x * factor."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(out + i, load(x + i) * factor)
    for i in range(4 * whole, 4 * num_values, 4):
        poke(out + i, peek(x + i, float32) * factor)


@inlined
def negate_row(x, num_values, out):
    """out = -x."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(out + i, -load(x + i))
    for i in range(4 * whole, 4 * num_values, 4):
        poke(out + i, -peek(x + i, float32))


@inlined
def multiply_rows(x, y, num_values, out):
    """out = x * y."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(out + i, load(x + i) * load(y + i))
    for i in range(4 * whole, 4 * num_values, 4):
        poke(out + i, peek(x + i, float32) * peek(y + i, float32))


@inlined
def add_rows(x, y, num_values, out):
    """out = x + y."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(out + i, load(x + i) + load(y + i))
    for i in range(4 * whole, 4 * num_values, 4):
        poke(out + i, peek(x + i, float32) + peek(y + i, float32))


@inlined
def sigmoid_row(x, num_values, out):
    """out = sigmoid(x)."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(out + i, sigmoid(load(x + i)))
    for i in range(4 * whole, 4 * num_values, 4):
        poke(out + i, sigmoid(peek(x + i, float32)))


@inlined
def add_mask_row(x, num_values, position, fill):
    """x += fill after a position, and 0 up to it."""
    for j in range(num_values):
        poke(x + 4 * j, peek(x + 4 * j, float32) + (fill if j > position else ZERO))


@inlined
def softmax_row(x, num_values):
    """x = e**x / sum of e**x: `rounded_attention.softmax`. A row's memory is read up to a multiple of 16 numbers."""
    whole = num_values - num_values % 16
    top = lanes(peek(x, float32))
    for i in range(0, 4 * whole, 64):
        top = maximum(load(x + i), top)
    largest = max_lanes(top)
    for i in range(4 * whole, 4 * num_values, 4):
        largest = maximum(peek(x + i, float32), largest)
    total = lanes(ZERO)
    for i in range(0, 4 * whole, 64):
        e = exp(load(x + i) - largest)
        store(x + i, e)
        total = total + e
    if whole < num_values:
        left = np.float32(num_values - whole)
        seen = where_below(to_f32(lane_numbers()), left, load(x + 4 * whole) - largest, lanes(LOWEST))
        total = total + exp(seen)
        for i in range(4 * whole, 4 * num_values, 4):
            poke(x + i, exp(peek(x + i, float32) - largest))
    divide_row(x, num_values, sum_lanes(total))


@inlined
def divide_row(x, num_values, divisor):
    """x = x / divisor."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(x + i, load(x + i) / divisor)
    for i in range(4 * whole, 4 * num_values, 4):
        poke(x + i, peek(x + i, float32) / divisor)
