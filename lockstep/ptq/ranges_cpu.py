"""The search for the range with the least squared error: up to eighty times the work of rounding."""

import numpy as np

from lockstep.native.kernel import inlined, native
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import float32
from lockstep.native.simd import fma, lanes, load, peek, poke, store, sum_lanes
from lockstep.ops.rounded.grids import (
    EMAX,
    EMIN,
    HIGH,
    INFINITY,
    INTEGER,
    INVERSE,
    KIND,
    LARGEST,
    LOW,
    MANTISSA,
    ONE,
    SCALE,
    ZERO,
    ZERO_POINT,
    on_floats,
    on_integers,
)
from lockstep.ptq.ranges import set_range

NUM_FACTORS = 80  # tried ranges: 1.00, 0.99 .. 0.21 of the full range
HUNDRED = np.float32(100)
CHECKED = 16  # times sixteen numbers are summed up between two checks whether the sum exceeds the limit


@inlined
def rounded(x, g):
    """x, lanes or one number, on a grid of kind INTEGER or FLOAT."""
    if g[KIND] == INTEGER:
        return on_integers(x, g[SCALE], g[INVERSE], g[ZERO_POINT], g[LOW], g[HIGH])
    return on_floats(x * g[INVERSE], g[MANTISSA], g[EMIN], g[EMAX], g[LARGEST]) * g[SCALE]


@inlined
def last_errors(x, weights, first, count, g, unit, total):
    """The sum of sixteen lanes and of the squared errors of the last numbers, first .. count, fewer than sixteen."""
    memory = stack_memory(64)
    store(memory, total)
    for i in range(first, count):
        v = peek(x + 4 * i, float32)
        u, at = (v - rounded(v, g)) * unit, memory + 4 * (i - first)
        poke(at, fma((peek(weights + 4 * i, float32) if weights != 0 else ONE) * u, u, peek(at, float32)))
    return sum_lanes(load(memory))


@native
def squared_error(x, weights, count, g, unit, limit):
    """`ranges.squared_error` of `count` float32 at address x; any number above `limit` if the error is above it.

    weights: the address of as many float32; 0 for weights of 1.
    """
    total, whole = lanes(ZERO), count - count % 16
    for start in range(0, whole, 16 * CHECKED):
        for i in range(4 * start, 4 * min(start + 16 * CHECKED, whole), 64):
            v = load(x + i)
            u = (v - rounded(v, g)) * unit
            total = fma(load(weights + i) * u if weights != 0 else u, u, total)
        if sum_lanes(total) > limit:
            return INFINITY
    return last_errors(x, weights, whole, count, g, unit, total)


@native
def search_range(g, lowest, highest, x, weights, count):
    """Sets a grid of kind INTEGER or FLOAT to the range with the least squared error of `count` float32 at address x.

    Tried are lowest .. highest times each factor of NUM_FACTORS; of equal errors the widest range wins. weights: see
    `squared_error`.
    """
    set_range(g, lowest, highest)
    unit, least, best = g[INVERSE], INFINITY, ONE
    for i in range(NUM_FACTORS):
        factor = np.float32(100 - i) / HUNDRED
        set_range(g, lowest * factor, highest * factor)
        error = squared_error(x, weights, count, g, unit, least)
        if error < least:
            least, best = error, factor
    set_range(g, lowest * best, highest * best)
