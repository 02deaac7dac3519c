"""Sum of two activations, the residual connection: the definition.

out[t, i] = x[t, i] + y[t, i]
"""

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows


class Add(Operands):
    """out = x + y; all [rows, width]."""

    group = "elementwise"
    in_place = True
    out: Tensor = output("width")
    x: Tensor = rows("width")
    y: Tensor = rows("width")
    width: int

    def flops(self, context):
        return self.width


@definition
def add(x_TD, y_TD, out_TD):
    """Adds y to x.

    Shapes: x, y, out [T, D] float32.
    Error: one rounding.
    Order: none.
    Source: He et al. 2015 (residual connections).
    """
    for t in range(x_TD.shape[0]):
        for i in range(x_TD.shape[1]):
            out_TD[t, i] = x_TD[t, i] + y_TD[t, i]


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a = Add.read(op)
        shape = num_rows(op, step), a.width
        add(carray(float_array(a.x), shape), carray(float_array(a.y), shape), carray(float_array(a.out), shape))


REFERENCE = {"add": Implementation(_run)}
