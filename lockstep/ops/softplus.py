"""softplus, one formula for scalars and for lanes."""

import numpy as np

from lockstep.ops.math import exp
from lockstep.runtime.kernel import inlined
from lockstep.runtime.simd import absolute, fma, maximum

ZERO, TWO = np.float32(0), np.float32(2)
A15, A13, A11, A9, A7, A5, A3 = (np.float32(1 / n) for n in (15, 13, 11, 9, 7, 5, 3))


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
