"""Where the kept tokens of a row end: part of the fast kernel of `sample`, and the layout of its scratch.

There is no sort: the last kept token is found by a radix search over the bits of the logits, in the few blocks whose
maximum says that they matter.
"""
import numpy as np
from numba import float32, int32, int64

from lockstep.ops.math import exp
from lockstep.ops.sample import (BLOCK, CHUNK, GIVEN, LOWEST, MIN_P, TEMPERATURE, TOP_K, TOP_P, WEIGHT_UNITS, ZERO,
                                 lowest_offset, nucleus)
from lockstep.runtime.kernel import inlined
from lockstep.runtime.machine import stack_memory
from lockstep.runtime.simd import (lane_numbers, lanes, load, max_lanes, maximum, peek, poke, rint, store, to_f32,
                                   to_i32, where_below)

FEW = 64  # blocks in which a nucleus is looked for first
DIGIT_BITS, HISTOGRAM_BYTES, LANE_BYTES = 11, 8 << 11, 64
INDEX_BITS, RANK_BITS, ALL_INDICES = 23, 55, (1 << 23) - 1  # a rank is a sort key of 32 bits, then the index inverted
ONE, INFINITY = np.float32(1), np.float32(np.inf)
WORDS, BLOCKS = 4, CHUNK // BLOCK  # bytes of a word, blocks of a chunk
# a row of scratch, by words per chunk: 16 maxima, sum of exp, best score, its token, total weight (two words); the cut;
# maxima and sum of exp of the logits before adjustment, where there was one
SUM, BEST, TOKEN, TOTAL, CUT = ((BLOCKS + n) * WORDS for n in (0, 1, 2, 3, 5))
CUT_BYTES, BAR = 16 * WORDS, 5 * WORDS


@inlined
def draws(record):
    """Whether a row's token is drawn, and neither given nor the likeliest."""
    return peek(record + TEMPERATURE, float32) != ZERO and peek(record + GIVEN, int32) == 0


@inlined
def entries(logits, i, V):
    """Sixteen logits from i on; minus infinity past the end."""
    return where_below(to_f32(lane_numbers()), np.float32(V - i), load(logits + 4 * i), -INFINITY)


@inlined
def row_maximum(scratch, C):
    """The largest logit of a row, from the maxima of its blocks."""
    top = lanes(LOWEST)
    for c in range(C):
        top = maximum(load(scratch + WORDS * BLOCKS * c), top)
    return max_lanes(top) + ZERO


@inlined
def weights_of(logits, temperature, largest):
    return to_i32(rint(exp(logits / temperature - largest) * WEIGHT_UNITS))


@inlined
def find_cut(logits, V, record, scratch, C):
    """Writes where the kept tokens of a row end.

    The lowest logit kept, the index up to which it is, the next logit above it, the largest logit / temperature, how
    far below that a kept one may lie; and BAR, the best score known, at first none.
    """
    temperature, top_p = peek(record + TEMPERATURE, float32), peek(record + TOP_P, float32)
    limit = peek(record + TOP_K, int32)
    top, limited, cut = row_maximum(scratch, C), 0 < limit < V, scratch + CUT * C
    largest = top / temperature
    wanted, total, last = int64(FEW), int64(0), int64(0)
    if limited:
        wanted = int64(limit)
    for c in range(0 if limited else C):
        total += peek(scratch + TOTAL * C + 8 * c, int64)
    if draws(record) and top > LOWEST and (limited or top_p < ONE):
        bound = sort_key(block_bound(scratch, C, wanted)) << INDEX_BITS
        weighted = not limited
        while top_p < ONE or not weighted:
            found = search(logits, V, scratch, max(bound, last), temperature, largest, weighted, wanted, total, top_p)
            last = max(last, found)
            if found < 0 and bound > 0:
                bound = int64(0)
            elif weighted:
                break
            else:
                weighted = True
    poke(cut, from_key(last >> INDEX_BITS) if last > 0 else -INFINITY)
    poke(cut + 4, np.int32(ALL_INDICES - (last & ALL_INDICES)))
    poke(cut + 8, from_key((last >> INDEX_BITS) + 1))
    poke(cut + 12, largest)
    poke(cut + 16, lowest_offset(peek(record + MIN_P, float32)))
    poke(cut + BAR, LOWEST)


@inlined
def block_bound(maxima, C, wanted):
    """A logit that at least `wanted` tokens reach: each step takes the next smaller maximum of a block."""
    bound, steps = INFINITY, wanted if wanted <= 2 * FEW else 0
    for _ in range(steps):
        below = lanes(-INFINITY)
        for c in range(C):
            block = load(maxima + WORDS * BLOCKS * c)
            below = maximum(where_below(block, bound, block, -INFINITY), below)
        bound = max_lanes(below)
    return bound if steps > 0 else -INFINITY


@inlined
def search(logits, V, maxima, first, temperature, largest, weighted, wanted, total, top_p):
    """Rank of the token at which the running sum reaches its target.

    Only tokens whose rank is at least `first` count, each as one or by its weight; total 0 stands for the sum of all of
    them. -1 where they hold too little. A radix search, eleven bits of the rank at a time.
    """
    histogram, target = stack_memory(HISTOGRAM_BYTES), np.float64(wanted)
    # the leading one marks how many bits are known; the optimizer cannot count the rounds and so does not unroll them
    prefix, before, shift, low, high = int64(1), int64(0), int64(RANK_BITS), from_key(first >> INDEX_BITS), INFINITY
    while prefix < 1 << RANK_BITS:
        shift -= DIGIT_BITS
        digit = int64((1 << DIGIT_BITS) - 1)
        mass = tally(logits, V, maxima, first, low, high, temperature, largest, weighted, prefix, shift, histogram)
        if weighted and prefix == 1:
            target = nucleus(total if total > 0 else mass, top_p)
            if mass < target:
                return int64(-1)
        while digit > 0 and before + peek(histogram + 8 * digit, int64) < target:
            before += peek(histogram + 8 * digit, int64)
            digit -= 1
        prefix = prefix << DIGIT_BITS | digit
        lowest = (prefix << shift) - (1 << RANK_BITS)
        if not weighted and before + peek(histogram + 8 * digit, int64) == target:
            return max(first, lowest)  # all that begin like this
        low, high = from_key(lowest >> INDEX_BITS), from_key(lowest + (1 << shift) - 1 >> INDEX_BITS)
    return prefix - (1 << RANK_BITS)


@inlined
def tally(logits, V, maxima, first, low, high, temperature, largest, weighted, prefix, shift, histogram):
    """Sums amounts by the next digit, over the ranks from first on that begin with prefix; returns the sum of all.

    Those ranks are of logits between low and high: a comparison of sixteen passes over most of the others.
    """
    weights, mass = stack_memory(LANE_BYTES), int64(0)
    for d in range(0, HISTOGRAM_BYTES, 8):
        poke(histogram + d, int64(0))
    for b in range(0, V, BLOCK):
        if peek(maxima + WORDS * (b // BLOCK), float32) < low:
            continue
        for g in range(b, min(b + BLOCK, V), 16):
            logit = entries(logits, g, V)
            if max_lanes(where_below(logit, low, -INFINITY, where_below(high, logit, -INFINITY, logit))) == -INFINITY:
                continue
            store(weights, weights_of(logit, temperature, largest))
            for i in range(g, min(g + 16, V)):
                place = rank(logits, i)
                if (place | 1 << RANK_BITS) >> shift + DIGIT_BITS == prefix and place >= first:
                    amount, at = int64(1), histogram + 8 * (place >> shift & (1 << DIGIT_BITS) - 1)
                    if weighted:
                        amount = int64(peek(weights + 4 * (i - g), int32))
                    poke(at, peek(at, int64) + amount)
                    mass += amount
    return mass


@inlined
def rank(logits, i):
    """An integer that falls along the order (logit descending, index ascending)."""
    return sort_key(peek(logits + 4 * i, float32)) << INDEX_BITS | ALL_INDICES - i


@inlined
def sort_key(x):
    """A float32 as an integer of 32 bits in the same order; both zeros alike."""
    bits = int64(np.float32(x + ZERO).view(np.int32))
    return (bits ^ (bits >> 63 & 0x7FFFFFFF)) + 0x80000000


@inlined
def from_key(key):
    """The float32 of a sort key, no further out than the infinities."""
    signed = min(max(key, 0x007FFFFF), 0xFF800000) - 0x80000000
    return np.int32(signed ^ (signed >> 63 & 0x7FFFFFFF)).view(np.float32)
