"""The soft cap of logits, which keeps them between -cap and cap: the definition.

out[r, i] = cap * tanh(logits[r, i] / cap)
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import absolute, fma, minimum, where_below
from lockstep.ops.math import EXP_HIGHEST, ONE, TWO, ZERO, exp
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows

NEAR_ZERO = np.float32(0.625)
# Cephes' fit of (tanh(x) - x) / x^3 in x^2, for |x| below 0.625
T11, T9, T7, T5, T3 = (
    np.float32(c) for c in (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
)


class SoftCap(Operands):
    """out = cap * tanh(logits / cap); both [rows, width]."""

    rules = ("width % 16 == 0", "cap > 0")
    out: Tensor = output("width")
    logits: Tensor = rows("width")
    width: int
    cap: float

    def flops(self, context):
        return 20 * self.width


@inlined
def tanh(x):
    """The hyperbolic tangent.

    Error: 1.6 ulp. Order: below 0.625 in size fma(x, s * p(s), x) with s = x * x and p of degree 4 by Horner's rule;
    else 1 - 2 / (1 + e**(2 |x|)) with 2 |x| limited to 88, and the sign of x.
    """
    s, size = x * x, absolute(x)
    p = fma(fma(fma(fma(T11, s, T9), s, T7), s, T5), s, T3)
    far = ONE - TWO / (ONE + exp(minimum(size + size, EXP_HIGHEST)))
    return where_below(size, NEAR_ZERO, fma(x, s * p, x), where_below(x, ZERO, -far, far))


@inlined
def capped(x, cap):
    """cap * tanh(x / cap); NaN for a number that is not finite, so that a broken row is still seen.

    Error: 4 ulp from 1e-35 on. Order: t = tanh(x / cap); fma(x, 0, cap * t).
    """
    return fma(x, ZERO, cap * tanh(x / cap))


@definition
def soft_cap(logits_RV, cap, out_RV):
    """Caps every logit.

    Shapes: logits, out [R, V] float32.
    Error: 4 ulp of the float64 result.
    Order: `capped`.
    Source: Gemma 2 (Riviere et al. 2024), final_logit_softcapping.
    """
    for r in range(logits_RV.shape[0]):
        for i in range(logits_RV.shape[1]):
            out_RV[r, i] = capped(logits_RV[r, i], cap)


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a = SoftCap.read(op)
        shape = num_rows(op, step), a.width
        soft_cap(carray(float_array(a.logits), shape), a.cap, carray(float_array(a.out), shape))


REFERENCE = {"soft_cap": Implementation(_run)}
