"""Copies some rows of a tensor, such as those with an output: the definition.

out[r] = x[selected[r]]
"""

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray, int64
from lockstep.native.simd import peek
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import StepBlock, num_rows

# the step block's array of the selected rows, by the letter that counts them
SELECTED = {"O": "output_row", "R": "sampled_row", "E": "embedded_row"}


class SelectRows(Operands):
    """out[r] = x[selected[r]]. selected: the step block's word with the array of rows, see `selected_rows`."""

    out: Tensor = output("width")
    x: Tensor = rows("width", other_rows=True)
    width: int
    selected: int

    def check(self):
        if self.out.rows not in SELECTED or self.selected != selected_rows(self.out.rows):
            allowed = ", ".join(f"{selected_rows(letter)} ({name}) of {letter}" for letter, name in SELECTED.items())
            raise ValueError(f"SelectRows: selected is {self.selected} of rows {self.out.rows}, expected {allowed}")


def selected_rows(letter):
    """The index of the step block's word with the array of selected rows that a letter counts."""
    return StepBlock.index(SELECTED[letter])


@definition
def select_rows(x_TD, selected_R, out_RD):
    """Copies the selected rows.

    Shapes: x [T, D] float32; selected [R] int32, each a row of x; out [R, D].
    Error: none.
    Order: none.
    """
    for r in range(selected_R.shape[0]):
        for i in range(x_TD.shape[1]):
            out_RD[r, i] = x_TD[selected_R[r], i]


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, R, T = SelectRows.read(op), num_rows(op, step), StepBlock.read(step).num_tokens
        selected_R = carray(int_array(peek(step + 8 * a.selected, int64)), (R,))
        select_rows(carray(float_array(a.x), (T, a.width)), selected_R, carray(float_array(a.out), (R, a.width)))


REFERENCE = {"select_rows": Implementation(_run)}
