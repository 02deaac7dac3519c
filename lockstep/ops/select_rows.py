"""The rows of a step that sample: the definition.

    out[r] = x[sampled_row[r]]
"""
from numba import carray

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, kernel
from lockstep.runtime.machine import float_array, int_array
from lockstep.runtime.step import NUM_TOKENS, SAMPLED_ROW, num_rows, step_word, word


@definition
def select_rows(x_TD, sampled_row_R, out_RD):
    """Copies the rows that reach the last norm and the head.

    Shapes: x [T, D] float32; sampled_row [R] int32, each below T; out [R, D].
    Error: none.
    Order: none.
    """
    for r in range(sampled_row_R.shape[0]):
        for i in range(x_TD.shape[1]):
            out_RD[r, i] = x_TD[sampled_row_R[r], i]


@kernel
def _run(op, step, thread, num_threads):
    """Op row: out, x, D."""
    if thread == 0:
        R, T, D = num_rows(op, step), step_word(step, NUM_TOKENS), word(op, 2)
        select_rows(carray(float_array(word(op, 1)), (T, D)), carray(int_array(step_word(step, SAMPLED_ROW)), (R,)),
                    carray(float_array(word(op, 0)), (R, D)))


REFERENCE = {"select_rows": Implementation(_run)}
