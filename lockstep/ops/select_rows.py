"""Some rows of a tensor, those with an output: the definition.

out[r] = x[selected[r]]
"""

from numba import carray

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, kernel
from lockstep.runtime.machine import float_array, int_array
from lockstep.runtime.step import NUM_TOKENS, num_rows, step_word, word


@definition
def select_rows(x_TD, selected_R, out_RD):
    """Copies the rows that go on.

    Shapes: x [T, D] float32; selected [R] int32, each a row of x; out [R, D].
    Error: none.
    Order: none.
    """
    for r in range(selected_R.shape[0]):
        for i in range(x_TD.shape[1]):
            out_RD[r, i] = x_TD[selected_R[r], i]


@kernel
def _run(op, step, thread, num_threads):
    """Op row: out, x, D, the step's word that has the rows."""
    if thread == 0:
        R, T, D = num_rows(op, step), step_word(step, NUM_TOKENS), word(op, 2)
        select_rows(
            carray(float_array(word(op, 1)), (T, D)),
            carray(int_array(step_word(step, word(op, 3))), (R,)),
            carray(float_array(word(op, 0)), (R, D)),
        )


REFERENCE = {"select_rows": Implementation(_run)}
