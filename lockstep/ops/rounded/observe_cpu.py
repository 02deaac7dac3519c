"""Statistics of activations: the fast kernel. Bound by one counter in memory after another, a nanosecond a number."""

from lockstep.native.kernel import inlined, kernel, native
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.simd import lanes, load, max_lanes, maximum, minimum, peek, poke, where_below
from lockstep.ops.elementwise.activations import magnitude
from lockstep.ops.rounded.fake_quant import seen_width
from lockstep.ops.rounded.grids import INFINITY
from lockstep.ops.rounded.observe import (
    BINS,
    COUNT,
    FIRST_BIN,
    HISTOGRAM,
    INFINITE_BIN,
    MAXIMUM,
    MINIMUM,
    MOST,
    NOT_FINITE,
    SHIFT,
    SIZE_BITS,
    TOO_MANY,
    WORDS,
    ZERO,
    Observe,
)
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows


@inlined
def add(words, index, number):
    """Adds to one word."""
    poke(words + 4 * index, int32(peek(words + 4 * index, int32) + number))


@inlined
def count_bin(bits, words):
    """Counts one number, by its bits, in the histogram or as not finite."""
    place = int64(bits & SIZE_BITS) >> SHIFT
    if place >= INFINITE_BIN:
        add(words, NOT_FINITE, 1)
    else:
        add(words, HISTOGRAM + min(max(place - FIRST_BIN, 0), BINS - 1) + (BINS if bits < 0 else 0), 1)


@inlined
def lower(x, low):
    """The lower of x and low, lanes or one number; low where x is not finite."""
    return minimum(where_below(magnitude(x), INFINITY, x + ZERO, low), low)


@inlined
def higher(x, high):
    return maximum(where_below(magnitude(x), INFINITY, x + ZERO, high), high)


@inlined
def find_extremes(x, num_values, words):
    """Updates smallest and largest with num_values float32 at x."""
    least, most = peek(words + 4 * MINIMUM, float32), peek(words + 4 * MAXIMUM, float32)
    low, high, whole = lanes(least), lanes(most), num_values - num_values % 16
    for i in range(0, 4 * whole, 64):
        v = load(x + i)
        low, high = lower(v, low), higher(v, high)
    least, most = ZERO - max_lanes(ZERO - low), max_lanes(high)
    for i in range(4 * whole, 4 * num_values, 4):
        v = peek(x + i, float32)
        least, most = lower(v, least), higher(v, most)
    poke(words + 4 * MINIMUM, least)
    poke(words + 4 * MAXIMUM, most)


@native
def observe_row(x, num_values, words):
    """Adds num_values float32 at address x to a head's words at an address, as `observe.observe_row` does."""
    before = int64(peek(words + 4 * COUNT, int32))
    if before == TOO_MANY or before > MOST - num_values:
        poke(words + 4 * COUNT, int32(TOO_MANY))
    else:
        add(words, COUNT, num_values)
        find_extremes(x, num_values, words)
        for i in range(0, 4 * num_values, 4):
            count_bin(peek(x + i, int32), words)


@kernel
def observe(op, step, thread, num_threads):
    """Rows are dealt to as many threads as there are copies."""
    a = Observe.read(op)
    if thread < a.copies:
        for h in range(a.num_heads):
            words = a.counters + 4 * WORDS * (thread * a.num_heads + h)
            for t in strided(num_rows(op, step), thread, min(num_threads, a.copies), False):
                x = a.x + 4 * (a.width * t + a.column + h * a.stride)
                observe_row(x, seen_width(a, step, t), words)


CPU = {"observe": Implementation(observe)}
