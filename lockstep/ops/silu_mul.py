"""SwiGLU's product of a gate and a value: the definition.

out[t, i] = silu(x[t, i]) * x[t, F + i]
"""

from numba import carray

from lockstep.ops.activations import Preparable
from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.operands import rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows


class SiluMul(Preparable):
    """out = silu(first half of x) * second half; x [rows, 2 width], out [rows, width] or as prepared."""

    group = "elementwise"
    x: Tensor = rows("2 * width")

    def flops(self, context):
        return 4 * self.width


@definition
def silu_mul(x_TE, out_TF):
    """silu of the first half of each row, times its second half.

    Shapes: x [T, 2 F] float32, gate then up; out [T, F]; F a multiple of 16.
    Error: below 3 ulp.
    Order: silu as in `math`, then one product.
    Source: Shazeer 2020 (SwiGLU).
    """
    T, F = out_TF.shape
    for t in range(T):
        for i in range(F):
            out_TF[t, i] = silu(x_TE[t, i]) * x_TE[t, F + i]


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, T = SiluMul.read(op), num_rows(op, step)
        silu_mul(carray(float_array(a.x), (T, 2 * a.width)), carray(float_array(a.out), (T, a.width)))


REFERENCE = {"silu_mul": Implementation(_run)}
