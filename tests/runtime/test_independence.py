"""Which ops need no barrier between them, and that threads do not wait there."""

import numpy as np
import pytest

from lockstep.native.kernel import kernel
from lockstep.native.machine import fetch_add, wait_until
from lockstep.native.numbers import int64
from lockstep.native.simd import peek, poke
from lockstep.ops.elementwise.add import Add
from lockstep.ops.linear.linear import Linear
from lockstep.runtime.executor import aligned
from lockstep.runtime.independence import may_go_on
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import FLAGS, GOES_ON, KERNEL, OPERANDS, ROW_WORDS
from lockstep.runtime.threads import Team

WIDTH, BYTES = 96, 1024
NAMES = ("x", "y", "z", "out", "other")
TENSORS = {name: Tensor(name, "T", WIDTH) for name in NAMES}
PLACES = {TENSORS[name]: (BYTES * i, BYTES * (i + 1)) for i, name in enumerate(NAMES)}
ENOUGH = 1 << 22  # spins, with yields: seconds


def linear(out, x, column=0, features=48, residual=None):
    tensors = dict(out=TENSORS[out], x=TENSORS[x], residual=TENSORS[residual] if residual else None)
    sizes = dict(in_features=WIDTH, out_features=features, width=WIDTH, column=column)
    return Linear(**tensors, weight=Weight("w", "f32", (features, WIDTH), ()), **sizes)


def add(out, x, y):
    return Add(out=TENSORS[out], x=TENSORS[x], y=TENSORS[y], width=WIDTH)


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ([linear("out", "x"), linear("out", "x", 48)], [True, False]),
        ([linear("out", "x"), linear("other", "x")], [True, False]),
        ([linear("out", "x", residual="y"), linear("out", "x", 48, residual="y")], [True, False]),
        ([linear("out", "x"), linear("out", "x", 32)], [False, False]),  # columns that overlap
        ([linear("out", "x"), add("y", "out", "x")], [False, False]),  # reads what is written
        ([linear("out", "x"), linear("x", "y")], [False, False]),  # writes what is read
        ([linear("out", "x", 0, 32), linear("out", "x", 32, 32), linear("out", "x", 64, 32)], [True, True, False]),
        ([linear("out", "x"), linear("other", "x"), add("y", "out", "x")], [True, False, False]),  # not of the last one
        ([], []),
    ],
)
def test_neighbours_that_touch_nothing_of_each_other_need_no_barrier(ops, expected):
    assert may_go_on(ops, PLACES.__getitem__) == expected


def test_tensors_that_share_memory_are_one():
    places = PLACES | {TENSORS["other"]: (BYTES // 2, BYTES)}  # within x
    assert may_go_on([linear("out", "x"), linear("other", "y")], places.__getitem__) == [False, False]


@kernel
def first_waits_for_next(op, step, thread, num_threads):
    """Thread 0 stays until another thread has come to the next op, and says whether one has."""
    words = peek(op + 8 * OPERANDS, int64)
    if thread == 0:
        poke(words + 8, int64(wait_until(words, 1, ENOUGH)))


@kernel
def next_comes(op, step, thread, num_threads):
    """Every thread but 0 says that it is here."""
    if thread != 0:
        fetch_add(peek(op + 8 * OPERANDS, int64), 1)


@pytest.mark.parametrize("num_threads", [2, 20])
def test_threads_go_on_where_they_may(num_threads):
    words, table = np.zeros(2, np.int64), aligned(16 * ROW_WORDS).view(np.int64).reshape(2, ROW_WORDS)
    for row, each in zip(table, (first_waits_for_next, next_comes), strict=True):
        row[KERNEL], row[OPERANDS] = each.address, words.ctypes.data
    table[:, FLAGS] = GOES_ON  # behind the last one they meet all the same
    team = Team(num_threads)
    team.run(table.ctypes.data, 2, 0)
    assert words.tolist() == [num_threads - 1, 1]
    team.close()
