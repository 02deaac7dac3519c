"""Sum of two activations, the residual connection, and the sum times a number: the definitions.

out[t, i] = x[t, i] + factor * y[t, i]          out[t, i] = (x[t, i] + y[t, i]) * factor
"""

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows


class Add(Operands):
    """out = x + factor * y; all [rows, width]. factor: of residuals in Granite."""

    group = "elementwise"
    in_place = True
    out: Tensor = output("width")
    x: Tensor = rows("width")
    y: Tensor = rows("width")
    width: int
    factor: float = 1.0

    def flops(self, context):
        return self.width * (1 if self.factor == 1 else 2)


class AddScaled(Operands):
    """out = (x + y) * factor; x, y and out [rows, width]; factor: one number."""

    group = "elementwise"
    in_place = True
    out: Tensor = output("width")
    x: Tensor = rows("width")
    y: Tensor = rows("width")
    factor: Weight = constant("1")
    width: int

    def flops(self, context):
        return 2 * self.width


@definition
def add(x_TD, y_TD, factor, out_TD):
    """Adds factor * y to x.

    Shapes: x, y, out [T, D] float32.
    Error: one rounding.
    Order: fma(y, factor, x), which is x + y if factor is 1.
    Source: He et al. 2015 (residual connections).
    """
    for t in range(x_TD.shape[0]):
        for i in range(x_TD.shape[1]):
            out_TD[t, i] = fma(y_TD[t, i], factor, x_TD[t, i])


@definition
def add_scaled(x_TD, y_TD, factor_1, out_TD):
    """Adds y to x, and multiplies by a number.

    Shapes: x, y, out [T, D], factor [1], float32.
    Error: two roundings.
    Order: (x + y) * factor.
    Source: Gemma 4, `layer_scalar`.
    """
    for t in range(x_TD.shape[0]):
        for i in range(x_TD.shape[1]):
            out_TD[t, i] = (x_TD[t, i] + y_TD[t, i]) * factor_1[0]


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a = Add.read(op)
        shape = num_rows(op, step), a.width
        x, y = carray(float_array(a.x), shape), carray(float_array(a.y), shape)
        add(x, y, a.factor, carray(float_array(a.out), shape))


@kernel
def _run_scaled(op, step, thread, num_threads):
    if thread == 0:
        a = AddScaled.read(op)
        x, y, out = float_array(a.x), float_array(a.y), float_array(a.out)
        shape, factor_1 = (num_rows(op, step), a.width), carray(float_array(a.factor), (1,))
        add_scaled(carray(x, shape), carray(y, shape), factor_1, carray(out, shape))


REFERENCE = {"add": Implementation(_run), "add_scaled": Implementation(_run_scaled)}
