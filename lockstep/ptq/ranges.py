"""From a range of numbers to a grid, its scale and zero point, and the error of rounding: the definitions."""

import numpy as np

from lockstep.native.kernel import definition
from lockstep.native.simd import absolute, fma, maximum, minimum
from lockstep.ops.math import tree_sum
from lockstep.ops.rounded.grids import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    FLOAT,
    HIGH,
    INTEGER,
    INVERSE,
    KIND,
    LARGEST,
    LOW,
    ONE,
    SCALE,
    SMALLEST_SCALE,
    ZERO,
    ZERO_POINT,
    asymmetric_scale,
    quantize_row,
    symmetric_scale,
)

NVFP4_LARGEST = E2M1_LARGEST * E4M3_LARGEST


@definition
def set_range(g, lowest, highest):
    """Sets scale and zero point of a grid [GRID_WORDS] for the range from lowest to highest, extended to 0: finite
    float32. The grid must be of a kind that has a range."""
    low, high = minimum(lowest, ZERO), maximum(highest, ZERO)
    amax = maximum(ZERO - low, high)
    if int(g[KIND]) == INTEGER:
        scale, zero = symmetric_scale(amax, g[HIGH]), ZERO
        if g[LOW] == ZERO:
            scale, zero = asymmetric_scale(low, high, g[LOW], g[HIGH])
        g[ZERO_POINT] = zero
    else:
        scale = symmetric_scale(amax, g[LARGEST] if int(g[KIND]) == FLOAT else NVFP4_LARGEST)
    g[SCALE], g[INVERSE] = scale, ONE / scale


@definition
def is_constant(lowest, highest):
    """Whether lowest and highest are so close that the numbers between them count as one number."""
    return np.float64(highest) - np.float64(lowest) < np.float64(SMALLEST_SCALE)


@definition
def set_constant(g, value):
    """Sets scale and zero point of an asymmetric grid of a whole tensor for one number, which is one step away from 0.
    Source: TICO 0.3.0, affine observers."""
    size = absolute(value)
    g[SCALE] = ONE if size <= SMALLEST_SCALE else size
    g[INVERSE], g[ZERO_POINT] = ONE / g[SCALE], g[HIGH] if value < ZERO - SMALLEST_SCALE else ZERO


@definition
def squared_error(x, weights, g, unit):
    """The sum of weights * (x - x rounded to g)**2, in units of 1 / unit**2.

    Shapes: x, weights: float32 [n]; g: a grid of kind INTEGER or FLOAT. Order: u = (x - rounded) * unit, then
      lane i % 16 = fma(weight * u, u, lane) over i ascending, then the lanes by `tree_sum`. No lane ever decreases, so
      that a sum of the first numbers is a lower bound of the sum of all.
    """
    rounded, lane = x.copy(), np.zeros(16, np.float32)
    quantize_row(rounded, g)
    for i in range(x.size):
        u = (x[i] - rounded[i]) * unit
        lane[i % 16] = fma(weights[i] * u, u, lane[i % 16])
    return tree_sum(lane)
