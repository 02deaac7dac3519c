"""From a range of numbers to a grid: scale and zero point, and the search for the range that loses least."""

import numpy as np

from lockstep.ops.grids import (
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
    ZERO,
    ZERO_POINT,
    asymmetric_scale,
    quantize_row,
    symmetric_scale,
)
from lockstep.runtime.kernel import definition
from lockstep.runtime.simd import maximum, minimum

NVFP4_LARGEST = E2M1_LARGEST * E4M3_LARGEST
NUM_FACTORS = 80  # 1.00, 0.99 .. 0.21 of the range of all numbers
HUNDRED = np.float32(100)
NEVER_LESS = np.inf
CHECKED = 64  # numbers that are summed up before a look whether the sum is too large already


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
def squared_error(x, weights, g, rounded, limit):
    """Sum of weights * (x - x rounded to g)**2, or any number above `limit` once the sum is above it.

    Shapes: x float32 and weights float64, of one length; rounded float32 [CHECKED], scratch. Order: ascending, float64.
    """
    total = 0.0
    for start in range(0, x.size, CHECKED):
        size = min(CHECKED, x.size - start)
        rounded[:size] = x[start : start + size]
        quantize_row(rounded[:size], g)
        for i in range(size):
            error = np.float64(x[start + i]) - np.float64(rounded[i])
            total += weights[start + i] * (error * error)
        if total > limit:
            break
    return total


@definition
def search_range(g, lowest, highest, x, weights):
    """Gives a grid of no blocks the range, a hundredth after another smaller than lowest .. highest, with the least
    squared error; of several such the widest. See `set_range` and `squared_error`."""
    least, best, rounded = NEVER_LESS, ONE, np.empty(CHECKED, np.float32)
    for i in range(NUM_FACTORS):
        factor = np.float32(100 - i) / HUNDRED
        set_range(g, lowest * factor, highest * factor)
        error = squared_error(x, weights, g, rounded, least)
        if error < least:
            least, best = error, factor
    set_range(g, lowest * best, highest * best)
