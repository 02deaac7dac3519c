"""Statistics of activations: kernel, definition and a count by hand are equal."""

from typing import Any

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops import BACKENDS
from lockstep.ops.rounded import observe, observe_cpu
from lockstep.ops.rounded.observe import BINS, COUNT, HISTOGRAM, MAXIMUM, MINIMUM, NOT_FINITE, WORDS, Observe, cleared
from lockstep.runtime.program import Program, Setting
from tests.ops.harness import ragged_step, run_op, same_bits

RNG = np.random.default_rng(5)
ODD = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 2.0**-32, -(2.0**-33), 2.0**32, -3e38, np.nan, np.inf, -np.inf, 1.0, -1.0], np.float32
)


def numbers(num_rows, width):
    """Rows of numbers of all magnitudes, special ones among them."""
    x = (RNG.standard_normal((num_rows, width)) * np.exp2(RNG.integers(-40, 40, (num_rows, width)))).astype(np.float32)
    at = RNG.integers(0, x.size, x.size // 4)
    x.ravel()[at] = RNG.choice(ODD, at.size)
    return x


def count(table, x, num_threads=1, copies=None, step=None, words=None, **changes):
    """The words after a run: int32 [copies, heads, WORDS]."""
    sizes: dict[str, Any] = dict(width=x.shape[1], column=0, stride=0, head_width=x.shape[1], num_heads=1) | changes
    copies = copies or num_threads
    words = cleared(sizes["num_heads"], copies) if words is None else words
    run_op(table, Observe, step=step, num_threads=num_threads, x=x, counters=words, copies=copies, **sizes)
    return words.reshape(copies, sizes["num_heads"], WORDS)


def together(words):
    """All copies joined, [heads, WORDS]."""
    made = words.sum(0, dtype=np.int32)
    extremes = words[..., MINIMUM : MAXIMUM + 1].view(np.float32)
    made[:, MINIMUM], made[:, MAXIMUM] = (
        found.astype(np.float32).view(np.int32) for found in (extremes[..., 0].min(0), extremes[..., 1].max(0))
    )
    return made


def by_hand(x):
    """The words of an array's numbers, from the definition of a bin in float64."""
    made, good = cleared(1, 1)[0], x[np.isfinite(x)].astype(np.float64)
    made[COUNT], made[NOT_FINITE] = x.size, x.size - good.size
    if good.size:
        made[MINIMUM], made[MAXIMUM] = (np.float32(v + 0.0).view(np.int32) for v in (good.min(), good.max()))
    for value in good:
        fraction, exponent = np.frexp(abs(value))  # |value| = fraction * 2**exponent, fraction from 1/2
        bin = 16 * (int(exponent) - 1 + 32) + int(fraction * 32) - 16
        made[HISTOGRAM + min(max(bin if value else 0, 0), BINS - 1) + BINS * int(np.signbit(value))] += 1
    return made


@pytest.mark.parametrize("width", [1, 15, 16, 33, 256])
def test_kernel_equals_definition(width):
    x = numbers(7, width)
    expected = by_hand(x)
    same_bits(count(observe.REFERENCE, x)[0, 0], expected)
    for num_threads in (1, 2, 3):
        words = count(observe_cpu.CPU, x, num_threads)
        same_bits(together(words)[0], expected)
        assert words[:, 0, COUNT].tolist() == [width * len(range(t, 7, num_threads)) for t in range(num_threads)]
    words = cleared(1, 1)[0]
    for row in x:
        interpreted(observe.observe_row)(row, words)
    same_bits(words, expected)


def test_bins():
    x = np.array([[1.0, 1.0625, 1.99, 2.0, -1.0, 2.0**-32, 2.0**32, 0.0, -0.0]], np.float32)
    histogram = count(observe_cpu.CPU, x)[0, 0, HISTOGRAM:].reshape(2, BINS)
    assert {int(b): int(histogram[0, b]) for b in np.flatnonzero(histogram[0])} == {
        0: 2,  # 2**-32 and 0
        16 * 32: 1,
        16 * 32 + 1: 1,
        16 * 32 + 15: 1,
        16 * 33: 1,
        BINS - 1: 1,
    }
    assert {int(b): int(histogram[1, b]) for b in np.flatnonzero(histogram[1])} == {0: 1, 16 * 32: 1}


def test_the_smallest_zero_has_no_sign():
    for x in ([0.0, -0.0], [-0.0, 0.0], [-0.0] * 20, [-0.0, np.nan]):
        for table in (observe.REFERENCE, observe_cpu.CPU):
            words = count(table, np.array([x], np.float32))[0, 0]
            assert words[[MINIMUM, MAXIMUM]].tolist() == [0, 0]


def test_numbers_are_added_to_those_before():
    x = numbers(5, 40)
    for table in (observe.REFERENCE, observe_cpu.CPU):
        words = count(table, x[:2])
        count(table, x[2:], words=words.reshape(1, WORDS))
        same_bits(words[0, 0], by_hand(x))


def test_fewer_copies_than_threads():
    x = numbers(7, 40)
    words = count(observe_cpu.CPU, x, num_threads=3, copies=2)
    same_bits(together(words)[0], by_hand(x))


def test_heads_and_columns():
    x = numbers(4, 80)
    for table in (observe.REFERENCE, observe_cpu.CPU):
        words = together(count(table, x, num_threads=2, column=16, stride=32, head_width=16, num_heads=2))
        for head in range(2):
            same_bits(words[head], by_hand(x[:, 16 + 32 * head : 32 + 32 * head]))


def test_keys_that_a_row_does_not_see_are_not_counted():
    x, step = numbers(3, 96), ragged_step([3], [34])
    expected = by_hand(np.concatenate([x[0, :32], x[1, :33], x[2, :34]]))
    for table in (observe.REFERENCE, observe_cpu.CPU):
        same_bits(count(table, x, step=step[0], seen_only=True)[0, 0], expected)


def test_with_an_added_mask_all_keys_of_a_sequence_are_counted():
    x, step = numbers(3, 96), ragged_step([2, 1], [34, 70])
    expected = by_hand(np.concatenate([x[0, :34], x[1, :34], x[2, :70]]))
    for table in (observe.REFERENCE, observe_cpu.CPU):
        same_bits(count(table, x, step=step[0], seen_only=True, additive=True)[0, 0], expected)
    with pytest.raises(ValueError, match="expected seen_only >= additive, got seen_only False, additive True"):
        count(observe_cpu.CPU, x, additive=True)


def test_too_many_numbers_are_seen_as_such():
    x = numbers(1, 40)
    for table in (observe.REFERENCE, observe_cpu.CPU):
        words = cleared(1, 1)
        words[0, COUNT] = observe.MOST - 40
        assert count(table, x, words=words)[0, 0, COUNT] == observe.MOST
        before = words.copy()
        assert count(table, x, words=words)[0, 0, COUNT] == observe.TOO_MANY
        assert count(table, x, words=words)[0, 0, COUNT] == observe.TOO_MANY
        same_bits(words[:, COUNT + 1 :], before[:, COUNT + 1 :])


def test_rows_are_those_of_x():
    program = Program()
    made = dict(width=8, column=0, stride=0, head_width=8, num_heads=1, copies=1)
    for letter in ("T", "O"):
        op = Observe(x=program.give("x", letter, 8), counters=Setting("c", cleared(1, 1)), **made)
        assert program.emit(op) is None and op.rows == letter and op.outputs == ()
    with pytest.raises(ValueError, match=r"counters \(c\) is 1 x 2052 wide, expected 2 x 2052"):
        Observe(x=program.give("x", "T", 8), counters=Setting("c", cleared(1, 1)), **made | dict(copies=2))
    assert "observe" in BACKENDS["cpu"] and "observe" in BACKENDS["reference"]
