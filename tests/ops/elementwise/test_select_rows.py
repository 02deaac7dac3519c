"""Selection of rows by each letter that counts them."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import select_rows, select_rows_cpu
from lockstep.ops.elementwise.select_rows import SelectRows, selected_rows
from lockstep.runtime.program import Tensor
from tests.ops.harness import ragged_step, run_op, same_bits

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("lengths,rows", [([1], [0]), ([5, 1, 9], [4, 5, 14]), ([3, 4], [6, 2, 0, 6, 1]), ([2], [])])
@pytest.mark.parametrize("backend", [select_rows.REFERENCE, select_rows_cpu.CPU])
@pytest.mark.parametrize("letter,array", [("R", "sampled_row"), ("E", "embedded_row")])
def test_takes_the_rows_asked_for(backend, lengths, rows, letter, array):
    x = RNG.standard_normal((sum(lengths), 48)).astype(np.float32)
    step, _held = ragged_step(lengths, **{array: rows})
    for threads in 1, 3:
        out = run_op(backend, SelectRows, step, threads, letter, x=x, width=48, selected=selected_rows(letter))["out"]
        same_bits(out, x[np.array(rows, int)])


def test_rows_that_another_letter_counts_are_refused():
    for letter, selected in (("R", selected_rows("E")), ("T", selected_rows("R"))):
        with pytest.raises(
            ValueError, match=rf"selected is {selected} of rows {letter}, expected .*\(sampled_row\) of R"
        ):
            SelectRows(out=Tensor("out", letter, 16), x=Tensor("x", "T", 16), width=16, selected=selected)


def test_definition_interpreted():
    x, out = RNG.standard_normal((4, 16)).astype(np.float32), np.empty((2, 16), np.float32)
    interpreted(select_rows.select_rows)(x, np.array([3, 1], np.int32), out)
    same_bits(out, x[[3, 1]])
