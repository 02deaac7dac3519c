"""The soft cap of logits, which keeps them between -cap and cap: the definition.

out[r, i] = cap * tanh(logits[r, i] / cap)
"""

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma
from lockstep.ops.hyperbolic import tanh
from lockstep.ops.math import ZERO
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows


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
