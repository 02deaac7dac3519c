"""Statistics of activations, for each head: count, range and histogram. The definition.

Only whole numbers are added up, and smallest and largest numbers found, so that the result does not depend on the
order of the numbers, on how threads share them, or on which of them were counted in one step.

A head is WORDS int32: the count of numbers, how many of them are not finite (they are in no other word), the
smallest and the largest as the bits of float32 (a zero without its sign; +inf and -inf before the first number), and a
histogram of BINS counters for numbers without a sign bit, and of BINS for those with one. A bin is a sixteenth of the
range between two powers of two; bins begin at 2**-32 and end at 2**32. Smaller numbers are counted in the first bin,
and larger ones in the last.
"""

import numpy as np

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray
from lockstep.native.simd import maximum, minimum
from lockstep.ops.math import ZERO
from lockstep.ops.rounded.fake_quant import seen_width
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, rows, setting
from lockstep.runtime.program import Setting, Tensor
from lockstep.runtime.step import num_rows

COUNT, NOT_FINITE, MINIMUM, MAXIMUM, HISTOGRAM = range(5)
BINS = 64 * 16
WORDS = HISTOGRAM + 2 * BINS
SHIFT = 19  # bits of a float32 below those that choose its bin
FIRST_BIN, INFINITE_BIN = (127 - 32) * 16, 255 * 16  # bits >> SHIFT of 2**-32, and of infinity
SIZE_BITS = 0x7FFFFFFF
MOST = 2**31 - 1  # the largest count
TOO_MANY = -1  # the count of more numbers than that


class Observe(Operands):
    """Counts the numbers of x. Head h is head_width columns from column + h * stride on.

    counters: int32 words, [copies, num_heads, WORDS], to which numbers are added until a reader clears them, see
    `cleared`. A thread adds to a copy of its own; at most `copies` threads work. seen_only and additive: as in
    `FakeQuant`.
    """

    rules = (
        "num_heads >= 1",
        "head_width >= 1",
        "copies >= 1",
        "column + (num_heads - 1) * stride + head_width <= width",
        "seen_only >= additive",
    )
    x: Tensor = rows("width")
    counters: Setting = setting(f"copies * num_heads, {WORDS}", dtype="i32")
    width: int
    column: int
    stride: int
    head_width: int
    num_heads: int
    copies: int
    seen_only: bool = False
    additive: bool = False

    @property
    def rows(self) -> str:
        """The letter that counts x's rows: there is no output."""
        return self.x.rows


def cleared(num_heads: int, copies: int) -> np.ndarray:
    """New words to which nothing was added: int32 [copies * num_heads, WORDS]."""
    words = np.empty((copies * num_heads, WORDS), np.int32)
    clear(words)
    return words


def clear(words: np.ndarray) -> None:
    """Clears words, int32 [.., WORDS]."""
    words[...] = 0
    words[..., MINIMUM] = np.float32(np.inf).view(np.int32)
    words[..., MAXIMUM] = np.float32(-np.inf).view(np.int32)


@definition
def observe_row(x, words):
    """Adds a row of float32 to a head's words.

    Order: none, since only whole numbers are added.
    """
    bits, extremes = x.view(np.int32), words[MINIMUM : MAXIMUM + 1].view(np.float32)
    if words[COUNT] == TOO_MANY or words[COUNT] > MOST - x.size:
        words[COUNT] = TOO_MANY
        return
    words[COUNT] += x.size
    for i in range(x.size):
        place = (bits[i] & SIZE_BITS) >> SHIFT
        if place >= INFINITE_BIN:
            words[NOT_FINITE] += 1
        else:
            words[HISTOGRAM + min(max(place - FIRST_BIN, 0), BINS - 1) + (BINS if bits[i] < 0 else 0)] += 1
            extremes[0] = minimum(x[i] + ZERO, extremes[0])
            extremes[1] = maximum(x[i] + ZERO, extremes[1])


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a = Observe.read(op)
        for h in range(a.num_heads):
            words = carray(int_array(a.counters + 4 * WORDS * h), (WORDS,))
            for t in range(num_rows(op, step)):
                x = float_array(a.x + 4 * (a.width * t + a.column + h * a.stride))
                observe_row(carray(x, (seen_width(a, step, t),)), words)


REFERENCE = {"observe": Implementation(_run)}
