"""Elementary functions, one formula for scalars and for lanes: no libm, whose bits change from host to host."""

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.simd import absolute, exponent, fma, mantissa, maximum, minimum, pow2, rint, where_below

ZERO, ONE = np.float32(0), np.float32(1)
LOG2E, MINUS_LN2_HIGH, MINUS_LN2_LOW = np.float32(1.44269504), np.float32(-0.693359375), np.float32(2.12194440e-4)
EXP_LOWEST, EXP_HIGHEST = np.float32(-87), np.float32(88)
E7, E6, E5, E4, E3, E2 = (np.float32(1 / n) for n in (5040, 720, 120, 24, 6, 2))
TWO, HALF, LN2_HIGH, LN2_LOW = np.float32(2), np.float32(0.5), np.float32(0.693359375), np.float32(-2.12194440e-4)
SQRT_HALF, SQRT_TWO = np.float32(0.70710678), np.float32(1.41421356)
# minimax fits of (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1]
L10, L9, L8, L7, L6, L5, L4, L3 = (
    np.float32(c)
    for c in (-0.0763443, 0.1276155, -0.13160194, 0.14201762, -0.16623357, 0.20001227, -0.25000823, 0.3333333)
)
A15, A13, A11, A9, A7, A5, A3 = (np.float32(1 / n) for n in (15, 13, 11, 9, 7, 5, 3))


@inlined
def exp(x):
    """e**x for x <= 88; exactly 0 below -87, so that no denormal is ever produced.

    Error: 0.94 ulp. Order: x = n ln 2 + r with n = rint(x log2 e) and ln 2 in two parts, then a degree-7 polynomial by
    Horner's rule, then a multiplication by 2**n.
    """
    n = rint(x * LOG2E)
    return where_below(x, EXP_LOWEST, ZERO, _exp_of_rest(x, n) * pow2(where_below(x, EXP_LOWEST, ZERO, n)))


@inlined
def _exp_of_rest(x, n):
    """e**(x - n ln 2)."""
    r = fma(n, MINUS_LN2_LOW, fma(n, MINUS_LN2_HIGH, x))
    p = fma(fma(fma(E7, r, E6), r, E5), r, E4)
    return fma(fma(fma(fma(p, r, E3), r, E2), r, ONE), r, ONE)


@inlined
def one_plus_exp(x):
    """1 + e**x, x limited to 88 from above. The same bits as ONE + exp(x): a power of two changes no digit before the
    sum, and below -87, where `exp` is 0, nothing is added that float32 could hold."""
    limited = maximum(EXP_LOWEST, minimum(x, EXP_HIGHEST))
    n = rint(limited * LOG2E)
    return fma(_exp_of_rest(limited, n), pow2(n), ONE)


@inlined
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return ONE / one_plus_exp(-x)


@inlined
def silu(x):
    """x * sigmoid(x), as one division."""
    return x / one_plus_exp(-x)


@inlined
def log(x):
    """Natural logarithm of a normal positive x.

    Error: 0.86 ulp. Order: x = 2**e * m with m in [sqrt(1/2), sqrt(2)), f = m - 1 exactly, then `_log_sum`.
    """
    e, m = exponent(x), mantissa(x)
    f = where_below(m, SQRT_TWO, m, m * HALF) - ONE
    return _log_sum(f, where_below(m, SQRT_TWO, e, e + ONE))


@inlined
def log1p(y):
    """log(1 + y) for -1 < y < 2**24, without loss near 0.

    Error: 2.4 ulp. Order: as `log` of the rounded 1 + y, but f = y where 1 + y is in [sqrt(1/2), sqrt(2)).
    """
    x = ONE + y
    near = where_below(x, SQRT_HALF, ZERO, where_below(x, SQRT_TWO, ONE, ZERO))
    e, m = exponent(x), mantissa(x)
    f = where_below(m, SQRT_TWO, m, m * HALF) - ONE
    return _log_sum(where_below(ZERO, near, y, f), where_below(ZERO, near, ZERO, where_below(m, SQRT_TWO, e, e + ONE)))


@inlined
def _log_sum(f, e):
    """log(1 + f) + e ln 2: f - f^2 / 2 + f^3 p(f), with p of degree 7 by Horner's rule and ln 2 in two parts."""
    square = f * f
    p = fma(fma(fma(fma(L10, f, L9), f, L8), f, L7), f, L6)
    p = fma(fma(fma(p, f, L5), f, L4), f, L3)
    tail = fma(square, -HALF, fma(f * square, p, e * LN2_LOW))
    return fma(e, LN2_HIGH, f + tail)


@inlined
def softplus(x):
    """log(1 + e**x), for any finite x.

    Error: below 3 ulp. Order: z = e**-|x|, s = z / (2 + z), y = s * s; log(1 + z) = 2 atanh(s) = 2s + 2s * y * p(y)
    with p of degree 6 by Horner's rule; then max(x, 0) + log(1 + z).
    """
    z = exp(-absolute(x))
    s = z / (TWO + z)
    y = s * s
    p = fma(fma(fma(fma(fma(fma(A15, y, A13), y, A11), y, A9), y, A7), y, A5), y, A3)
    double = s + s
    return maximum(x, ZERO) + fma(double * y, p, double)


@inlined
def tree_sum(lane):
    """Sum of the 16 lanes of an accumulator: lanes 8 apart are added, then 4, 2 and 1 apart, as in `simd.sum_lanes`."""
    width = 8
    while width >= 1:
        for i in range(width):
            lane[i] = lane[i] + lane[i + width]
        width //= 2
    return lane[0]
