"""Integer linear layers with fixed-point outputs (a multiplier and a shift), as accelerators have: the definition.

    out = (code - zero) * scale (+ residual)        code = clamp(zero + round(acc * M / 2**shift), low, high)

acc is the sum of `ops/integer/code_linear.py`; scale, zero, low and high belong to the output's grid. M / 2**shift is
scale of x * scale of w / scale, to 31 bits: an accelerator's compiler computes it once, here each value does.
Source: the quantized multiplier of gemmlowp and TensorFlow Lite, rounded once, for sums of up to 2**39.
"""

import math

import numpy as np

from lockstep.formats.parts.products import codes_at, floats_at
from lockstep.native.kernel import definition, kernel
from lockstep.native.numbers import int32, int64
from lockstep.native.simd import maximum, minimum, peek
from lockstep.ops.integer.code_linear import CodeLinear, centered_row, code_dot
from lockstep.ops.integer.code_rows import code_bytes, tail_of
from lockstep.ops.integer.code_weights import ROWS
from lockstep.ops.linear.linear import finish
from lockstep.ops.rounded.grids import GRID_WORDS, HIGH, INTEGER, KIND, LOW, SCALE, UNKNOWN, ZERO_POINT
from lockstep.ops.share import contiguous
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import setting
from lockstep.runtime.program import Setting
from lockstep.runtime.step import num_rows

# where results, and sums with a large multiplier, are cut off: past the codes of any grid, which are clamped anyway
MAX_RESULT, MAX_LARGE_SUM = 1 << 20, 1 << 18


class CodeFixed(CodeLinear):
    """`CodeLinear` whose outputs are rounded to a grid by an integer multiplier and a shift. On a grid of another kind
    than INTEGER they are NaN."""

    grid: Setting = setting(f"1, {GRID_WORDS}")


@definition
def requantized(acc, m):
    """acc * m, rounded half away from zero, at most MAX_RESULT in size: round(acc * M / 2**shift).

    Order: m = f * 2**e with 0.5 <= f < 1; M = floor(f * 2**31 + 0.5); shift = 31 - e; then integers, exactly.
    """
    f, e = math.frexp(m)
    M, shift, size = int(f * 2.0**31 + 0.5), 31 - e, abs(acc)
    if shift < 17:
        product, right = min(size, MAX_LARGE_SUM) * M, max(shift, 1)
    else:  # the product has up to 70 bits, of which the last 16 are cut off: they cannot change the result
        product, right = size * (M >> 16) + (size * (M & 65535) >> 16), min(shift - 16, 62)
    rounded = min((product + (1 << (right - 1))) >> right, MAX_RESULT)
    return -rounded if acc < 0 else rounded


@definition
def fixed_value(acc, x_scale, w_scale, grid):
    """The value of an integer sum on a grid [GRID_WORDS]: its code in float32, exact, then (code - zero) * scale."""
    m = (np.float64(x_scale) * np.float64(w_scale)) / np.float64(grid[SCALE])
    if grid[KIND] != INTEGER or m != m:
        return UNKNOWN
    code = grid[ZERO_POINT] + np.float32(requantized(acc, m))
    code = maximum(minimum(code, grid[HIGH]), grid[LOW])
    return (code - grid[ZERO_POINT]) * grid[SCALE]


@kernel
def _run(op, step, thread, num_threads):
    """Row by row, each thread a contiguous share of the features, which are zero past the last up to whole panels."""
    a = CodeFixed.read(op)
    K, grid = a.in_features, floats_at(a.grid, 0, GRID_WORDS)
    for t in range(num_rows(op, step)):
        row = a.x + code_bytes(K) * t
        x, scale = centered_row(row, K), tail_of(row, K)[0]
        for n in contiguous((a.out_features + 15) // 16 * 16, thread, num_threads):
            acc = code_dot(x, codes_at(a.weight.codes, n, K), int64(peek(a.weight.m + 4 * n, int32)))
            finish(a, t, n, fixed_value(acc, scale, floats_at(a.weight.d, n, 1)[0], grid))


REFERENCE = {"code_fixed": Implementation(_run, ROWS)}
