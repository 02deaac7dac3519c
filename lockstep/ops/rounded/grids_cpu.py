"""Rounding a row of numbers to a grid: the fast form, sixteen lanes at a time, for kernels to end with."""

import numpy as np

from lockstep.native.kernel import inlined, native
from lockstep.native.machine import float_array, kept_apart
from lockstep.native.numbers import carray, float32
from lockstep.native.simd import lanes, load, max_lanes, maximum, minimum, peek, poke, pow2, rint, store
from lockstep.ops.elementwise.activations import magnitude
from lockstep.ops.rounded.grids import (
    E2M1_EMAX,
    E2M1_EMIN,
    E2M1_LARGEST,
    E2M1_MANTISSA,
    EMAX,
    EMIN,
    FLOAT,
    GRID_WORDS,
    HIGH,
    HIGHEST_CODE,
    INFINITY,
    INTEGER,
    INVERSE,
    KIND,
    LARGEST,
    LOW,
    MANTISSA,
    MICROSCALED,
    MICROSCALED_BLOCK,
    NVFP4,
    NVFP4_BLOCK,
    OFF,
    ONE,
    ONE_127TH,
    ROW_ASYMMETRIC,
    ROW_SYMMETRIC,
    SCALE,
    TINY,
    UNKNOWN,
    ZERO,
    ZERO_POINT,
    asymmetric_scale,
    block_exponent,
    nvfp4_scale,
    on_floats,
    on_integers,
    quantize_block,
    symmetric_scale,
)


@inlined
def word(grid, index):
    """One number of the grid at an address."""
    return peek(grid + 4 * index, float32)


@inlined
def quantize_integers(x, num_values, scale, inverse, zero, low, high):
    """Rounds num_values float32 at x, in place, to an integer grid."""
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(x + i, on_integers(load(x + i), scale, inverse, zero, low, high))
    for i in range(4 * whole, 4 * num_values, 4):
        poke(x + i, on_integers(peek(x + i, float32), scale, inverse, zero, low, high))


@inlined
def range_of(x, num_values):
    """(smallest, largest, largest absolute) of num_values float32 at x and 0; the last is inf if one is not finite."""
    low, high, size = lanes(ZERO), lanes(ZERO), lanes(ZERO)
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        v = load(x + i)
        low, high, size = minimum(v, low), maximum(v, high), maximum(magnitude(v), size)
    lowest, highest, amax = ZERO - max_lanes(ZERO - low), max_lanes(high), max_lanes(size)
    for i in range(4 * whole, 4 * num_values, 4):
        v = peek(x + i, float32)
        lowest, highest, amax = minimum(v, lowest), maximum(v, highest), maximum(magnitude(v), amax)
    return lowest, highest, amax


@inlined
def fill(x, num_values, value):
    """Sets num_values float32 at x to a value."""
    for i in range(0, 4 * num_values, 4):
        poke(x + i, value)


@inlined
def quantize_dynamic(x, num_values, grid, kind):
    lowest, highest, amax = range_of(x, num_values)
    low, high = word(grid, LOW), word(grid, HIGH)
    scale, zero = symmetric_scale(amax, high), ZERO
    if kind == ROW_ASYMMETRIC:
        scale, zero = asymmetric_scale(lowest, highest, low, high)
    if amax == INFINITY:
        fill(x, num_values, UNKNOWN)
    else:
        quantize_integers(x, num_values, scale, ONE / scale, zero, low, high)


@inlined
def quantize_floats(x, num_values, grid):
    scale, inverse, largest = word(grid, SCALE), word(grid, INVERSE), word(grid, LARGEST)
    mantissa, emin, emax = word(grid, MANTISSA), word(grid, EMIN), word(grid, EMAX)
    whole = num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        store(x + i, on_floats(load(x + i) * inverse, mantissa, emin, emax, largest) * scale)
    for i in range(4 * whole, 4 * num_values, 4):
        poke(x + i, on_floats(peek(x + i, float32) * inverse, mantissa, emin, emax, largest) * scale)


@inlined
def quantize_whole_block(x, grid, kind):
    """Rounds one block, 16 numbers of NVFP4 or else 32, as `grids.quantize_block` does."""
    size = NVFP4_BLOCK if kind == NVFP4 else MICROSCALED_BLOCK
    amax = max_lanes(maximum(magnitude(load(x)), magnitude(load(x + (0 if kind == NVFP4 else 64)))))
    if amax == INFINITY:
        fill(x, size, UNKNOWN)
    elif kind == MICROSCALED:
        mantissa, emin, emax = word(grid, MANTISSA), word(grid, EMIN), word(grid, EMAX)
        e, largest = block_exponent(amax, emax), word(grid, LARGEST)
        for i in range(0, 128, 64):
            store(x + i, on_floats(load(x + i) * pow2(ZERO - e), mantissa, emin, emax, largest) * pow2(e))
    elif kind == NVFP4:
        scale = nvfp4_scale(amax, word(grid, SCALE), word(grid, INVERSE))
        inverse = ONE / scale if scale > ZERO else ZERO
        store(x, on_floats(load(x) * inverse, E2M1_MANTISSA, E2M1_EMIN, E2M1_EMAX, E2M1_LARGEST) * scale)
    else:
        inverse = HIGHEST_CODE / amax if amax >= TINY else ZERO
        scale = amax * ONE_127TH if amax >= TINY else ZERO
        for i in range(0, 128, 64):
            store(x + i, rint(load(x + i) * inverse) * scale)


@inlined
def quantize_blocks(x, num_values, grid, kind):
    size = NVFP4_BLOCK if kind == NVFP4 else MICROSCALED_BLOCK
    whole = num_values - num_values % size
    for start in range(0, whole, size):
        quantize_whole_block(x + 4 * start, grid, kind)
    if whole < num_values:
        rest = carray(float_array(x + 4 * whole), (num_values - whole,))
        quantize_block(rest, carray(float_array(grid), (GRID_WORDS,)), kind)


@native
def quantize_row(x, num_values, grid):
    """Rounds num_values float32 at address x, in place, to the grid at an address, as `grids.quantize_row` does."""
    kept_apart()  # a kernel has it in up to twenty places
    kind = np.int64(word(grid, KIND))
    if kind == INTEGER:
        parts = word(grid, SCALE), word(grid, INVERSE), word(grid, ZERO_POINT)
        quantize_integers(x, num_values, parts[0], parts[1], parts[2], word(grid, LOW), word(grid, HIGH))
    elif kind == ROW_SYMMETRIC or kind == ROW_ASYMMETRIC:
        quantize_dynamic(x, num_values, grid, kind)
    elif kind == FLOAT:
        quantize_floats(x, num_values, grid)
    elif kind != OFF:
        quantize_blocks(x, num_values, grid, kind)
