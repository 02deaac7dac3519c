"""The columns of a tensor in another order."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise.select_columns import CPU, REFERENCE, SelectColumns, select_columns
from lockstep.runtime.program import Tensor, Weight
from lockstep.weights.tensor import StoredTensor
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)
WIDTH = 80


def stored(order):
    return StoredTensor("x.order", "i32", (1, len(order)), np.asarray(order, np.int32).reshape(1, -1))


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("backend, threads", [(REFERENCE, 1), (CPU, 2), (CPU, 7)])
def test_columns_in_another_order(backend, threads, num_tokens):
    """More threads than cache lines of a row, too."""
    x, order = RNG.standard_normal((num_tokens, WIDTH)).astype(np.float32), RNG.permutation(WIDTH)
    out = run_op(backend, SelectColumns, num_threads=threads, x=x, order=stored(order), width=WIDTH)["out"]
    same_bits(out, x[:, order])


def test_definition_interpreted():
    x, order = RNG.standard_normal((3, 16)).astype(np.float32), RNG.permutation(16).astype(np.int32)
    out = np.empty((3, 16), np.float32)
    interpreted(select_columns)(x, order, out)
    same_bits(out, x[:, order])


@pytest.mark.parametrize("order", [[0] * 16, [*range(1, 17)], [-1, *range(1, 16)]])
def test_an_order_that_does_not_name_each_column_once_is_refused(order):
    with pytest.raises(ValueError, match=r"tensor 'x.order': expected an int32 order of 16 columns, each once"):
        run_op(REFERENCE, SelectColumns, x=np.ones((1, 16), np.float32), order=stored(order), width=16)


def test_a_width_that_is_no_whole_lines_is_refused():
    order = stored(range(24))
    with pytest.raises(ValueError, match=r"expected width % 16 == 0, got width 24"):
        weight, (out, x) = Weight(order.name, "i32", (1, 24), (order,)), (Tensor(n, "T", 24) for n in ("out", "x"))
        SelectColumns(out=out, x=x, order=weight, width=24)
