"""SwiGLU's product as quantized hardware computes it: the definition.

sig = sigmoid(gate)    act = gate * sig    mul = act * up        each rounded to its grid
"""

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.ops.math import sigmoid
from lockstep.ops.rounded.grids import GRID_WORDS, quantize_row
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows, setting
from lockstep.runtime.program import Setting, Tensor
from lockstep.runtime.step import num_rows

SITES = ("act.sig", "act", "mul")


class RoundedSiluMul(Operands):
    """out = silu(first half of x) * second half, every intermediate on its grid; grids: of SITES."""

    group = "elementwise"
    out: Tensor = output("width")
    x: Tensor = rows("2 * width")
    grids: Setting = setting(f"{len(SITES)}, {GRID_WORDS}")
    width: int

    def flops(self, context):
        return 4 * self.width


@definition
def rounded_silu_mul(x_TE, grids, out_TF):
    """silu as two roundings, then the product.

    Shapes: x [T, 2 F] float32, gate then up; grids [3, GRID_WORDS]; out [T, F].
    Error: without grids below 3 ulp.
    Order: s = sigmoid(gate) of `math`, gate * s, times up; each product rounded.
    """
    T, F = out_TF.shape
    for t in range(T):
        for i in range(F):
            out_TF[t, i] = sigmoid(x_TE[t, i])
        quantize_row(out_TF[t], grids[0])
        for i in range(F):
            out_TF[t, i] = x_TE[t, i] * out_TF[t, i]
        quantize_row(out_TF[t], grids[1])
        for i in range(F):
            out_TF[t, i] = out_TF[t, i] * x_TE[t, F + i]
        quantize_row(out_TF[t], grids[2])


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, T = RoundedSiluMul.read(op), num_rows(op, step)
        grids = carray(float_array(a.grids), (3, GRID_WORDS))
        x_TE = carray(float_array(a.x), (T, 2 * a.width))
        rounded_silu_mul(x_TE, grids, carray(float_array(a.out), (T, a.width)))


REFERENCE = {"rounded_silu_mul": Implementation(_run)}
