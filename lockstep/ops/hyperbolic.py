"""The hyperbolic tangent, one formula for scalars and for lanes."""

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.simd import absolute, fma, where_below
from lockstep.ops.math import ONE, TWO, ZERO, one_plus_exp

NEAR_ZERO = np.float32(0.625)
# Cephes' fit of (tanh(x) - x) / x^3 in x^2, for |x| below 0.625
T11, T9, T7, T5, T3 = (
    np.float32(c) for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
)


@inlined
def tanh(x):
    """The hyperbolic tangent.

    Error: 1.6 ulp. Order: below 0.625 in size fma(x, s * p(s), x) with s = x * x and p of degree 4 by Horner's rule;
    else 1 - 2 / (1 + e**(2 |x|)) with 2 |x| limited to 88, and the sign of x.
    """
    s, size = x * x, absolute(x)
    p = fma(fma(fma(fma(T11, s, T9), s, T7), s, T5), s, T3)
    far = ONE - TWO / one_plus_exp(size + size)
    return where_below(size, NEAR_ZERO, fma(x, s * p, x), where_below(x, ZERO, -far, far))
