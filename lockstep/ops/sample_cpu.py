"""The choice of the next token: the fast kernel. A greedy row costs one pass over the logits, bound by exp.

Threads share every row by chunks of the vocabulary:  maxima of blocks and sums of exp | weights, where top_p restricts
all tokens | (one thread a row) where the kept tokens end | the best noisy score of a chunk | (one thread a row) token.
There is no sort: the last kept token is found by a radix search over the bits of the logits, in the few blocks whose
maximum says that they matter. Noise is made only for blocks with a kept token.
"""
import numpy as np
from numba import float32, int32, int64

from lockstep.ops.math import exp, log
from lockstep.ops.philox import noise_lanes, philox_lanes
from lockstep.ops.sample import (BLOCK, CHUNK, LOWEST, MIN_P, POSITION, RECORD_BYTES, SEED, TEMPERATURE, TOP_K, TOP_P,
                                 WEIGHT_UNITS, ZERO, lowest_offset, nucleus, scratch_width)
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import fetch_add, load_acquire, pause, stack_memory, yield_core
from lockstep.runtime.simd import (bit_and, fma, lane_numbers, lanes, load, load_i32, max_lanes, maximum, peek, poke,
                                   rint, shift_right, store, sum_lanes, to_f32, to_i32, where_below)
from lockstep.runtime.step import COUNTER, SAMPLING, num_rows, step_word, word

GROUP, GROUP_BYTES = 64, 256  # tokens that share sixteen Philox counters, and the bytes of their scores
FEW = 64  # blocks in which a nucleus is looked for first
DIGIT_BITS, HISTOGRAM_BYTES, LANE_BYTES = 11, 8 << 11, 64
INDEX_BITS, RANK_BITS, ALL_INDICES = 23, 55, (1 << 23) - 1  # a rank is a sort key of 32 bits, then the index inverted
ONE, INFINITY = np.float32(1), np.float32(np.inf)
WORDS, BLOCKS = 4, CHUNK // BLOCK  # bytes of a word, blocks of a chunk
# a row of scratch, by words per chunk: 16 maxima, sum of exp, best score, its token, total weight (two words); the cut
SUM, BEST, TOKEN, TOTAL, CUT = ((BLOCKS + n) * WORDS for n in (0, 1, 2, 3, 5))
scratch_words = inlined(scratch_width)


@kernel
def sample(op, step, thread, num_threads):
    """Op row: token, logprob, scratch, logits, V, width of a row of logits."""
    V, R, record = word(op, 4), num_rows(op, step), step_word(step, SAMPLING)
    C, logits, scratch, width = (V + CHUNK - 1) // CHUNK, word(op, 3), word(op, 2), WORDS * scratch_words(V)
    random, row = False, WORDS * word(op, 5)
    for r in range(R):
        random = random or peek(record + RECORD_BYTES * r + TEMPERATURE, float32) != ZERO
    for task in range(thread, R * C, num_threads):
        r, c = task // C, task % C
        scan_chunk(logits + row * r, V, scratch + width * r, c, C)
    wait_for_all(op, num_threads)
    if random:
        for task in range(thread, R * C, num_threads):
            r, c = task // C, task % C
            weigh_chunk(logits + row * r, V, record + RECORD_BYTES * r, scratch + width * r, c, C)
        wait_for_all(op, 2 * num_threads)
        for r in range(thread, R, num_threads):
            find_cut(logits + row * r, V, record + RECORD_BYTES * r, scratch + width * r, C)
        wait_for_all(op, 3 * num_threads)
        for task in range(thread, R * C, num_threads):
            r, c = task // C, task % C
            score_chunk(logits + row * r, V, record + RECORD_BYTES * r, scratch + width * r, c, C)
        wait_for_all(op, 4 * num_threads)
    for r in range(thread, R, num_threads):
        finish_row(logits + row * r, V, record + RECORD_BYTES * r, scratch + width * r, C, word(op, 0) + 4 * r,
                   word(op, 1) + 4 * r)


@inlined
def wait_for_all(op, arrivals):
    """A barrier inside the op: its counter starts every step at zero."""
    counter = peek(op + 8 * COUNTER, int64)
    fetch_add(counter, 1)
    spins = 0
    while load_acquire(counter) < arrivals:
        pause()
        spins += 1
        if spins > 50:
            yield_core()


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


# ---------------------------------------------------------------- chunks

@inlined
def scan_chunk(logits, V, scratch, c, C):
    """Maximum of each block, and the sum of exp(logit - the chunk's maximum)."""
    first, last = CHUNK * c, min(CHUNK * c + CHUNK, V)
    maxima, top, total = scratch + WORDS * BLOCKS * c, lanes(LOWEST), lanes(ZERO)
    store(maxima, top)  # the last chunk may have fewer blocks
    for b in range(first, last, BLOCK):
        block = lanes(LOWEST)
        for i in range(b, min(b + BLOCK, last), 16):
            block = maximum(entries(logits, i, V), block)
        poke(maxima + WORDS * ((b - first) // BLOCK), max_lanes(block))
        top = maximum(block, top)
    largest = max_lanes(top) + ZERO
    for i in range(first, last, 16):
        total = total + exp(entries(logits, i, V) - largest)
    poke(scratch + SUM * C + WORDS * c, sum_lanes(total))


@inlined
def weigh_chunk(logits, V, record, scratch, c, C):
    """Total weight of a chunk, exactly: low and high halves of the weights are summed apart, in int32."""
    temperature, limit = peek(record + TEMPERATURE, float32), int64(peek(record + TOP_K, int32))
    if temperature == ZERO or peek(record + TOP_P, float32) >= ONE or 0 < limit < V:
        return
    largest, low = row_maximum(scratch, C) / temperature, bit_and(lane_numbers(), 0)
    high = low
    for i in range(CHUNK * c, min(CHUNK * c + CHUNK, V), 16):
        weight = weights_of(entries(logits, i, V), temperature, largest)
        low, high = low + bit_and(weight, 0x7FFF), high + shift_right(weight, 15)
    poke(scratch + TOTAL * C + 8 * c, int64(sum_lanes(low)) + (int64(sum_lanes(high)) << 15))


@inlined
def weights_of(logits, temperature, largest):
    return to_i32(rint(exp(logits / temperature - largest) * WEIGHT_UNITS))


@inlined
def score_chunk(logits, V, record, scratch, c, C):
    """The best score of a chunk, and its first token."""
    scores, best, token, cut = stack_memory(GROUP_BYTES), LOWEST, int64(0), scratch + CUT * C
    temperature, end = peek(record + TEMPERATURE, float32), min(CHUNK * c + CHUNK, V)
    for g in range(CHUNK * c, end if temperature != ZERO else 0, GROUP):
        top = peek(scratch + WORDS * (g // BLOCK), float32)
        offset = top / temperature - peek(cut + 12, float32)
        if top >= peek(cut, float32) and offset >= peek(cut + 16, float32):
            highest = score_group(logits, V, record, cut, g, scores)
            if highest > best:
                best, token = highest, first_equal(scores, g, g, end, highest)
    poke(scratch + BEST * C + WORDS * c, best)
    poke(scratch + TOKEN * C + WORDS * c, np.int32(token))


@inlined
def score_group(logits, V, record, cut, g, scores):
    """Writes the scores of 64 tokens, minus infinity for those that are not kept; returns the highest.

    cut: the lowest logit kept, the index up to which it is, the next logit above it, the largest logit / temperature,
    and how far below that a kept one may lie.
    """
    words = philox_lanes(g, peek(record + POSITION, int64), peek(record + SEED, int64))
    store(scores, words[0])
    store(scores + 64, words[1])
    store(scores + 128, words[2])
    store(scores + 192, words[3])
    highest = lanes(LOWEST)
    for i in range(g, min(g + GROUP, V), 16):
        logit, kept_here, at = entries(logits, i, V), np.float32(peek(cut + 4, int32) + 1 - i), scores + 4 * (i - g)
        lowest = where_below(to_f32(lane_numbers()), kept_here, peek(cut, float32), peek(cut + 8, float32))
        scaled = logit / peek(record + TEMPERATURE, float32)
        score = where_below(logit, lowest, -INFINITY, scaled + noise_lanes(load_i32(at)))
        score = where_below(scaled - peek(cut + 12, float32), peek(cut + 16, float32), -INFINITY, score)
        store(at, score)
        highest = maximum(score, highest)
    return max_lanes(highest)


# ---------------------------------------------------------------- rows

@inlined
def find_cut(logits, V, record, scratch, C):
    """Writes where the kept tokens of a row end; see `score_group`."""
    temperature, top_p = peek(record + TEMPERATURE, float32), peek(record + TOP_P, float32)
    limit = peek(record + TOP_K, int32)
    top, limited, cut = row_maximum(scratch, C), 0 < limit < V, scratch + CUT * C
    largest = top / temperature
    wanted, total, last = int64(FEW), int64(0), int64(0)
    if limited:
        wanted = int64(limit)
    for c in range(0 if limited else C):
        total += peek(scratch + TOTAL * C + 8 * c, int64)
    if temperature != ZERO and top > LOWEST and (limited or top_p < ONE):
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


@inlined
def finish_row(logits, V, record, scratch, C, token_at, logprob_at):
    """Chooses among the chunks' tokens, or the first of the largest logits; and the token's log-probability."""
    largest, total, token, best = row_maximum(scratch, C), ZERO, int64(0), LOWEST
    for c in range(C):
        top = max_lanes(load(scratch + WORDS * BLOCKS * c)) + ZERO
        total = fma(peek(scratch + SUM * C + WORDS * c, float32), exp(top - largest), total)
    if peek(record + TEMPERATURE, float32) == ZERO or largest == LOWEST:
        token = first_equal(logits, int64(0), block_of(scratch, V, largest), V, largest)
    else:
        for c in range(C):
            if peek(scratch + BEST * C + WORDS * c, float32) > best:
                best = peek(scratch + BEST * C + WORDS * c, float32)
                token = int64(peek(scratch + TOKEN * C + WORDS * c, int32))
    poke(token_at, np.int32(token))
    poke(logprob_at, (peek(logits + 4 * token, float32) - largest) - log(total))


@inlined
def block_of(maxima, V, largest):
    """First token of the first block that holds the largest logit."""
    for b in range(0, V, BLOCK):
        if peek(maxima + WORDS * (b // BLOCK), float32) == largest:
            return b
    return V


@inlined
def first_equal(values, start, first, end, x):
    """The lowest index in first .. end - 1 whose value is x, 0 if there is none; values begin with that of `start`."""
    for i in range(first, end):
        if peek(values + 4 * (i - start), float32) == x:
            return i
    return int64(0)


CPU = {"sample": Implementation(sample)}
