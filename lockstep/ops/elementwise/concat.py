"""Two tensors side by side: the definition.

out[t] = first[t], second[t]
"""

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows


class Concat(Operands):
    """out = first and second, row by row; both widths multiples of 16."""

    group = "elementwise"
    rules = ("first_width % 16 == 0", "second_width % 16 == 0")
    out: Tensor = output("first_width + second_width")
    first: Tensor = rows("first_width")
    second: Tensor = rows("second_width")
    first_width: int
    second_width: int


@definition
def concat(first_TD, second_TE, out_TF):
    """Copies each row of first, then the same row of second.

    Shapes: first [T, D], second [T, E] float32; out [T, D + E].
    Error: none.
    Order: none.
    """
    T, D = first_TD.shape
    for t in range(T):
        for i in range(D):
            out_TF[t, i] = first_TD[t, i]
        for i in range(second_TE.shape[1]):
            out_TF[t, D + i] = second_TE[t, i]


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, T = Concat.read(op), num_rows(op, step)
        concat(
            carray(float_array(a.first), (T, a.first_width)),
            carray(float_array(a.second), (T, a.second_width)),
            carray(float_array(a.out), (T, a.first_width + a.second_width)),
        )


REFERENCE = {"concat": Implementation(_run)}
