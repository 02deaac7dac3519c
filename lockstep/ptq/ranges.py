"""From a range of numbers to a grid: scale and zero point, and what is lost by rounding. The definitions."""

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
    """Gives a grid [GRID_WORDS] of a kind that has a range the scale and zero point for numbers from lowest to highest,
    0 among them: float32, finite."""
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
    """Whether numbers from lowest to highest are taken as one number."""
    return np.float64(highest) - np.float64(lowest) < np.float64(SMALLEST_SCALE)


@definition
def set_constant(g, value):
    """Gives an asymmetric grid of a whole tensor the scale and zero point for one number: a code from zero, on its
    side, is the number itself. Source: TICO 0.3.0, affine observers."""
    size = absolute(value)
    g[SCALE] = ONE if size <= SMALLEST_SCALE else size
    g[INVERSE], g[ZERO_POINT] = ONE / g[SCALE], g[HIGH] if value < ZERO - SMALLEST_SCALE else ZERO


@definition
def squared_error(x, weights, g, unit):
    """The sum of weights * (x - x rounded to g)**2, in units of 1 / unit**2.

    Shapes: x, weights: float32 [n]; g: a grid of kind INTEGER or FLOAT. Order: u = (x - rounded) * unit, then
      lane i % 16 = fma(weight * u, u, lane) over i ascending, then the lanes by `tree_sum`. No lane ever becomes less,
      so that a sum of the first numbers is a lower bound of the sum of all.
    """
    rounded, lane = x.copy(), np.zeros(16, np.float32)
    quantize_row(rounded, g)
    for i in range(x.size):
        u = (x[i] - rounded[i]) * unit
        lane[i % 16] = fma(weights[i] * u, u, lane[i % 16])
    return tree_sum(lane)
