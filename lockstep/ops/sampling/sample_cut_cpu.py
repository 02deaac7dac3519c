"""Where the kept tokens of a row end: part of the fast kernel of `sample`, and the layout of its scratch.

There is no sort: the last kept token is found by a radix search over the bits of the logits, in the few blocks whose
maximum says that they matter.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.simd import (
    absolute,
    bit_and,
    bit_xor,
    lane_numbers,
    lanes,
    load,
    load_i32,
    max_lanes,
    maximum,
    minimum,
    peek,
    poke,
    rint,
    shift_right,
    store,
    to_f32,
    to_i32,
    where_below,
)
from lockstep.ops.math import ONE, exp
from lockstep.ops.sampling.sample import (
    BLOCK,
    CHUNK,
    GIVEN,
    INFINITY,
    LOWEST,
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WEIGHT_UNITS,
    ZERO,
    lowest_offset,
    nucleus,
)

FEW = 64  # blocks that are searched first for the end of a nucleus
DIGITS, HISTOGRAM_BYTES, GROUP, GROUP_BYTES = 2048, 2 * 8 * 2048, 64, 256
EVEN, TOP_DIGIT, DIGITS_PER_UNIT = 64, np.float32(2047), np.float32(93)  # exp(-2047 / 93) weighs nothing
INDEX_BITS, ALL_INDICES = 23, (1 << 23) - 1  # a token's rank is its key, then its index inverted
WORD, BLOCKS = 4, CHUNK // BLOCK  # bytes of a word of scratch, blocks of a chunk
# a row of scratch, by words per chunk: 16 maxima, sum of exp, best score, its token, total weight (two words); the cut;
# maxima and sum of exp of the logits before adjustment, where there was one
SUM, BEST, TOKEN, TOTAL, CUT = ((BLOCKS + n) * WORD for n in (0, 1, 2, 3, 5))
CUT_BYTES, BAR = 16 * WORD, 5 * WORD


class Row(NamedTuple):
    """A row of logits: their address and number V; the address of the maxima of blocks, and the number C of chunks."""

    logits: int
    V: int
    maxima: int
    C: int


class Weighing(NamedTuple):
    """How `search` counts: temperature, largest logit / temperature, and whether tokens count by weight or as 1."""

    temperature: float
    largest: float
    weighted: bool


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
        top = maximum(load(scratch + WORD * BLOCKS * c), top)
    return max_lanes(top) + ZERO


@inlined
def is_sound(scratch, C):
    """Whether a row has no logit that is NaN or +inf: the sum of its chunk would be NaN."""
    for c in range(C):
        total = peek(scratch + SUM * C + WORD * c, float32)
        if not total == total:
            return False
    return True


@inlined
def has_scores(record, scratch, C):
    """Whether a row's token is drawn, and there is a softmax to draw from."""
    if not draws(record) or not is_sound(scratch, C):
        return False
    top = row_maximum(scratch, C)
    return top > LOWEST and absolute(top / peek(record + TEMPERATURE, float32)) < INFINITY


@inlined
def weights_of(logits, temperature, largest):
    return to_i32(rint(exp(logits / temperature - largest) * WEIGHT_UNITS))


@inlined
def find_cut(logits, V, record, scratch, C):
    """Writes where the kept tokens of a row end.

    These are: the lowest logit kept, the index up to which tokens of that logit are kept, the next logit above it, the
    largest logit / temperature, how far below that a kept one may lie; and BAR, the best score so far, at first none.
    """
    temperature, top_p = peek(record + TEMPERATURE, float32), peek(record + TOP_P, float32)
    limit = peek(record + TOP_K, int32)
    top, limited, cut = row_maximum(scratch, C), 0 < limit < V, scratch + CUT * C
    largest, row = top / temperature, Row(logits, V, scratch, C)
    num_tokens, total, last = int64(FEW), int64(0), int64(0)
    if limited:
        num_tokens = int64(limit)
    for c in range(0 if limited else C):
        total += peek(scratch + TOTAL * C + 8 * c, int64)
    if has_scores(record, scratch, C) and (limited or top_p < ONE):
        bound = sort_key(block_bound(scratch, C, num_tokens)) << INDEX_BITS
        weighted = not limited
        while top_p < ONE or not weighted:
            weighing = Weighing(temperature, largest, weighted)
            rank = search(row, weighing, max(bound, last), num_tokens, total, top_p)
            last = max(last, rank)
            if rank < 0 and bound > 0:
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
def block_bound(maxima, C, num_tokens):
    """A logit that at least num_tokens tokens reach: each step takes the next smaller maximum of a block."""
    bound, steps = INFINITY, num_tokens if num_tokens <= 2 * FEW else 0
    for _ in range(steps):
        below = lanes(-INFINITY)
        for c in range(C):
            block = load(maxima + WORD * BLOCKS * c)
            below = maximum(where_below(block, bound, block, -INFINITY), below)
        bound = max_lanes(below)
    return bound if steps > 0 else -INFINITY


@inlined
def search(row, weighing, first, num_tokens, total, top_p):
    """Rank of the token at which the running sum reaches its target.

    The target is num_tokens or, by weight, the nucleus of total (0: the sum of all). Only tokens whose rank is at least
    `first` count; -1 where they sum to too little. Each round leaves the tokens of one digit: first of an even division
    of the logits, then of the rest of the sort keys; tokens of one key weigh the same and are counted.
    """
    temperature, largest, weighted = weighing
    histogram, target, before, shift = stack_memory(HISTOGRAM_BYTES), np.float64(num_tokens), int64(0), int64(EVEN)
    start, end = first >> INDEX_BITS, int64(1 << 32)
    while end - start > 1:
        tally(row, weighing, first, (start, end), shift, histogram)
        if weighted and shift == EVEN:
            mass = int64(0)
            for d in range(DIGITS):
                mass += amount(histogram, d)
            target = nucleus(total if total > 0 else mass, top_p)
            if mass < target:
                return int64(-1)
        digit = int64(DIGITS - 1)
        while digit > 0 and before + amount(histogram, digit) < target:
            before += amount(histogram, digit)
            digit -= 1
        if shift == EVEN:
            start, end = (
                max(start, lowest_key(digit, temperature, largest)),
                lowest_key(digit + 1, temperature, largest),
            )
        else:
            start, end = start + (digit << shift), min(end, start + (digit + 1 << shift))
        if not weighted and before + amount(histogram, digit) == target:
            return max(first, start << INDEX_BITS)  # all from here on
        shift = int64(0)
        while end - start > DIGITS << shift:
            shift += 1
    each, logit = int64(1), from_key(start)
    if weighted:
        each = int64(weights_of(logit, temperature, largest))
    return start << INDEX_BITS | ALL_INDICES - reaching(row, logit, before, each, target)


@inlined
def even_digits(logits, temperature, largest):
    """The first round's digits: they never fall as the logit rises, and tokens that weigh nothing have digit 0."""
    below = (largest - logits / temperature) * DIGITS_PER_UNIT
    return to_i32(TOP_DIGIT - minimum(below, TOP_DIGIT))


@inlined
def lowest_key(digit, temperature, largest):
    """The lowest sort key with at least this digit in the first round; one above all keys for a digit past the last."""
    low, high = int64(0), int64(1 << 32)
    while low < high:
        middle = (low + high) // 2
        logit = from_key(middle)
        if logit / temperature <= largest and int64(even_digits(logit, temperature, largest)) < digit:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def tally(row, weighing, first, keys, shift, histogram):
    """Sums amounts by digit over tokens of rank `first` or more with sort keys from keys[0] to keys[1] - 1.

    There are several sums for each digit: one alone would wait for its own last addition.
    """
    logits, V, maxima, _ = row
    temperature, largest, weighted = weighing
    start, end = keys
    amounts, digits, low, above = stack_memory(GROUP_BYTES), stack_memory(GROUP_BYTES), from_key(start), from_key(end)
    first_logit, after = from_key(first >> INDEX_BITS), from_key((first >> INDEX_BITS) + 1)
    for d in range(0, HISTOGRAM_BYTES, 64):
        store(histogram + d, lanes(ZERO))
    for b in range(0, V, GROUP):
        if peek(maxima + WORD * (b // BLOCK), float32) < low or none_between(logits, b, V, low, above):
            continue
        filled = int64(0)
        for g in range(b, min(b + GROUP, V), 16):
            logit, beyond = entries(logits, g, V), np.float32(ALL_INDICES + 1 - (first & ALL_INDICES) - g)
            lowest = maximum(where_below(to_f32(lane_numbers()), beyond, first_logit, after), low)
            counts = where_below(logit, lowest, ZERO, where_below(logit, above, ONE, ZERO))
            counts = where_below(to_f32(lane_numbers()), np.float32(V - g), counts, ZERO)
            if weighted:
                counts = counts * rint(exp(logit / temperature - largest) * WEIGHT_UNITS)
            store(amounts + filled, to_i32(counts))
            if shift == EVEN:
                store(digits + filled, even_digits(logit, temperature, largest))
            else:
                store(digits + filled, bit_and(shift_right(sort_keys(logit) - np.int32(start), shift), DIGITS - 1))
            filled += 64
        for i in range(0, filled, 8):
            one, other = 16 * int64(peek(digits + i, int32)), 16 * int64(peek(digits + i + 4, int32)) + 8
            add_to(histogram + one, int64(peek(amounts + i, int32)))
            add_to(histogram + other, int64(peek(amounts + i + 4, int32)))


@inlined
def none_between(logits, g, V, low, above):
    """Whether no token of a group has a logit of at least low and below above."""
    found = lanes(-INFINITY)
    for i in range(g, g + GROUP, 16):
        logit = entries(logits, i, V)
        found = maximum(where_below(logit, above, logit, -INFINITY), found)
    return max_lanes(found) < low


@inlined
def add_to(address, amount):
    poke(address, peek(address, int64) + amount)


@inlined
def amount(histogram, digit):
    """The sum over the tokens of a digit."""
    return peek(histogram + 16 * digit, int64) + peek(histogram + 16 * digit + 8, int64)


@inlined
def reaching(row, x, before, each, target):
    """The first token of logit x with which the running sum `before` reaches its target; each token adds `each`."""
    logits, V, maxima, _ = row
    for b in range(0, V, BLOCK):
        if peek(maxima + WORD * (b // BLOCK), float32) < x:
            continue
        for g in range(b, min(b + BLOCK, V), 16):
            logit = entries(logits, g, V)
            if max_lanes(where_below(logit, x, ZERO, where_below(x, logit, ZERO, ONE))) == ZERO:
                continue
            for i in range(g, min(g + 16, V)):
                if peek(logits + 4 * i, float32) == x:
                    before += each
                    if before >= target:
                        return int64(i)
    return int64(V - 1)


@inlined
def sort_key(x):
    """A float32 as an integer of 32 bits in the same order; both zeros alike."""
    bits = int64(np.float32(x + ZERO).view(np.int32))
    return (bits ^ (bits >> 63 & 0x7FFFFFFF)) + 0x80000000


@inlined
def sort_keys(x):
    """`sort_key` of lanes, as bit patterns."""
    memory = stack_memory(64)
    store(memory, x + ZERO)
    bits = load_i32(memory)
    return bit_xor(bits, shift_right(bits, 31) * np.int32(0x7FFFFFFF) + np.int32(-0x80000000))


@inlined
def from_key(key):
    """The float32 of a sort key, no further out than the infinities."""
    signed = min(max(key, 0x007FFFFF), 0xFF800000) - 0x80000000
    return np.int32(signed ^ (signed >> 63 & 0x7FFFFFFF)).view(np.float32)
