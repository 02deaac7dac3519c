"""Sum of two activations, the residual connection: the definition.

out[t, i] = x[t, i] + y[t, i]
"""

from numba import carray

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.step import num_rows, word


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
    """Op row: out, x, y, D."""
    if thread == 0:
        shape = num_rows(op, step), word(op, 3)
        add(
            carray(float_array(word(op, 1)), shape),
            carray(float_array(word(op, 2)), shape),
            carray(float_array(word(op, 0)), shape),
        )


REFERENCE = {"add": Implementation(_run)}
