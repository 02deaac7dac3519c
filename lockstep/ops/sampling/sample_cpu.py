"""The choice of the next token: the fast kernel. A greedy row costs one pass over the logits, bound by exp.

Threads share every row by chunks of the vocabulary:  maxima of blocks and sums of exp | weights, where top_p restricts
all tokens | (one thread a row) where the kept tokens end | the best noisy score of a chunk | (one thread a row) token
and likeliest tokens. Noise is made only for blocks with a kept token. An adjusted row is scanned before and after.
"""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.machine import fetch_add, prefetch, stack_memory, wait_until
from lockstep.native.numbers import float32, int32, int64
from lockstep.native.simd import (
    absolute,
    bit_and,
    fma,
    lane_numbers,
    lanes,
    load,
    load_i32,
    max_lanes,
    maximum,
    minimum,
    peek,
    poke,
    shift_right,
    store,
    sum_lanes,
    to_f32,
    where_below,
)
from lockstep.ops.math import exp, log
from lockstep.ops.sampling.philox import HALF_STEP, TO_UNIT, noise_lanes, philox_lanes
from lockstep.ops.sampling.sample import (
    ADJUSTMENT,
    BLOCK,
    CHUNK,
    GIVEN,
    INFINITY,
    LOWEST,
    MAX_LOGPROBS,
    NUM_LOGPROBS,
    POSITION,
    RECORD_BYTES,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNKNOWN,
    ZERO,
    Sample,
)
from lockstep.ops.sampling.sample_cut_cpu import (
    BAR,
    BEST,
    BLOCKS,
    CUT,
    CUT_BYTES,
    ONE,
    SUM,
    TOKEN,
    TOTAL,
    WORD,
    Row,
    block_bound,
    draws,
    entries,
    find_cut,
    has_scores,
    is_sound,
    row_maximum,
    weights_of,
)
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, StepBlock, num_rows

GROUP, GROUP_BYTES = 64, 256  # tokens that share sixteen Philox counters, and the bytes of their scores
SLACK, RELATIVE_SLACK = np.float32(1e-3), np.float32(2.0**-21)
TOP_BYTES = MAX_LOGPROBS * WORD


@kernel
def sample(op, step, thread, num_threads):
    """The passes above, with barriers on the op's own counter."""
    a, R, records = Sample.read(op), num_rows(op, step), StepBlock.read(step).sampling
    V, C, scratch, width = a.vocab_size, (a.vocab_size + CHUNK - 1) // CHUNK, a.scratch, WORD * a.scratch_width
    random, ahead = False, WORD * CHUNK * num_threads  # from a task's chunk to that of the thread's next task
    for r in range(R):
        random = random or draws(records + RECORD_BYTES * r)
    for task in range(thread, R * C, num_threads):
        r, c = task // C, task % C
        scan_chunk(choice(a, records, r), V, scratch + width * r, c, C, ahead)
        if is_adjusted(records + RECORD_BYTES * r):
            scan_chunk(plain(a, r), V, unadjusted(scratch + width * r, C), c, C, ahead)
    wait_for_all(op, num_threads)
    if random:
        for task in range(thread, R * C, num_threads):
            r, c = task // C, task % C
            weigh_chunk(choice(a, records, r), V, records + RECORD_BYTES * r, scratch + width * r, c, C)
        wait_for_all(op, 2 * num_threads)
        for r in range(thread, R, num_threads):
            find_cut(choice(a, records, r), V, records + RECORD_BYTES * r, scratch + width * r, C)
        wait_for_all(op, 3 * num_threads)
        for task in range(thread, R * C, num_threads):
            r, c = task // C, task % C
            score_chunk(choice(a, records, r), V, records + RECORD_BYTES * r, scratch + width * r, c, C)
        wait_for_all(op, 4 * num_threads)
    for r in range(thread, R, num_threads):
        finish_row(a, records, r, scratch + width * r, C)


@inlined
def plain(a, r):
    """Address of a row of logits."""
    return a.logits + WORD * a.width * r


@inlined
def choice(a, records, r):
    """Address of the logits that a row's token is chosen from."""
    if is_adjusted(records + RECORD_BYTES * r):
        return a.adjusted + WORD * a.width * r
    return plain(a, r)


@inlined
def is_adjusted(record):
    return peek(record + ADJUSTMENT, int64) != 0


@inlined
def unadjusted(scratch, C):
    """The address of maxima and sums of a row's logits before adjustment."""
    return scratch + CUT * C + CUT_BYTES


@inlined
def wait_for_all(op, arrivals):
    """A barrier inside the op: its counter starts every step at zero."""
    counter = peek(op + 8 * COUNTER, int64)
    fetch_add(counter, 1)
    wait_until(counter, arrivals)


# ---------------------------------------------------------------- chunks


@inlined
def scan_chunk(logits, V, scratch, c, C, ahead):
    """Maximum of each block, and the sum of exp(logit - the chunk's maximum), NaN where a logit is NaN or +inf.

    ahead: bytes to logits that are prefetched meanwhile: the maxima wait for memory, the exponentials do not.
    """
    first, last = CHUNK * c, min(CHUNK * c + CHUNK, V)
    maxima, top, total = scratch + WORD * BLOCKS * c, lanes(LOWEST), lanes(ZERO)
    store(maxima, top)  # the last chunk may have fewer blocks
    for b in range(first, last, BLOCK):
        block, end = lanes(LOWEST), min(b + BLOCK, last)
        for i in range(b, end - 15, 16):
            block = maximum(load(logits + WORD * i), block)
        if end % 16 != 0:
            block = maximum(entries(logits, end - end % 16, V), block)
        poke(maxima + WORD * ((b - first) // BLOCK), max_lanes(block))
        top = maximum(block, top)
    largest = max_lanes(top) + ZERO
    for i in range(first, last - 15, 16):
        prefetch(logits + WORD * i + ahead)
        total = total + weight(load(logits + WORD * i), largest)
    if last % 16 != 0:
        total = total + weight(entries(logits, last - last % 16, V), largest)
    poke(scratch + SUM * C + WORD * c, sum_lanes(total))


@inlined
def weight(logits, largest):
    """exp(logit - largest), NaN for one that is NaN or +inf."""
    return where_below(logits, INFINITY, exp(logits - largest), UNKNOWN)


@inlined
def weigh_chunk(logits, V, record, scratch, c, C):
    """Total weight of a chunk, exactly: low and high halves of the weights are summed apart, in int32."""
    temperature, limit = peek(record + TEMPERATURE, float32), int64(peek(record + TOP_K, int32))
    if not has_scores(record, scratch, C) or peek(record + TOP_P, float32) >= ONE or 0 < limit < V:
        return
    largest, low = row_maximum(scratch, C) / temperature, bit_and(lane_numbers(), 0)
    high = low
    for i in range(CHUNK * c, min(CHUNK * c + CHUNK, V), 16):
        weight = weights_of(entries(logits, i, V), temperature, largest)
        low, high = low + bit_and(weight, 0x7FFF), high + shift_right(weight, 15)
    poke(scratch + TOTAL * C + 8 * c, int64(sum_lanes(low)) + (int64(sum_lanes(high)) << 15))


@inlined
def score_chunk(logits, V, record, scratch, c, C):
    """The best score of a chunk, and its first token; LOWEST where another chunk has a better one."""
    scores, best, token, cut = stack_memory(GROUP_BYTES), LOWEST, int64(0), scratch + CUT * C
    end = min(CHUNK * c + CHUNK, V)
    for b in range(CHUNK * c, end if has_scores(record, scratch, C) else 0, BLOCK):
        if may_win(record, peek(scratch + WORD * (b // BLOCK), float32), cut, b):
            for g in range(b, min(b + BLOCK, end), GROUP):
                highest = score_group(logits, V, record, cut, g, scores)
                if highest > best:
                    best, token = highest, first_equal(scores, g, g, end, highest)
                    # another thread may overwrite this, which costs time and changes nothing else
                    poke(cut + BAR, maximum(peek(cut + BAR, float32), best))
    poke(scratch + BEST * C + WORD * c, best)
    poke(scratch + TOKEN * C + WORD * c, np.int32(token))


@inlined
def may_win(record, top, cut, b):
    """Whether a token of a block, whose largest logit is top, may be kept and win; cut: see `find_cut`."""
    scaled = top / peek(record + TEMPERATURE, float32)
    limit = highest_unit(scaled, peek(cut + BAR, float32))
    if top < peek(cut, float32) or scaled - peek(cut + 12, float32) < peek(cut + 16, float32) or limit < HALF_STEP:
        return False
    lowest, position, seed = lanes(INFINITY), peek(record + POSITION, int64), peek(record + SEED, int64)
    for g in range(b, b + BLOCK, 2 * GROUP):  # two at a time: a generator waits for its own multiplications
        one, other = philox_lanes(g, position, seed), philox_lanes(g + GROUP, position, seed)
        lowest = minimum(minimum(lowest_unit(one), lowest_unit(other)), lowest)
    return -max_lanes(-lowest) <= limit


@inlined
def lowest_unit(words):
    """The smallest u of four tokens in each lane, without its last rounding."""
    return minimum(minimum(unit(words[0]), unit(words[1])), minimum(unit(words[2]), unit(words[3])))


@inlined
def score_group(logits, V, record, cut, g, scores):
    """Writes the scores of 64 tokens, minus infinity for those that are not kept; returns the highest.

    Or returns minus infinity at once, if none can be as high as a score that is known. cut: see `find_cut`.
    """
    words = philox_lanes(g, peek(record + POSITION, int64), peek(record + SEED, int64))
    top = maximum(
        maximum(entries(logits, g, V), entries(logits, g + 16, V)),
        maximum(entries(logits, g + 32, V), entries(logits, g + 48, V)),
    )
    scaled = max_lanes(top) / peek(record + TEMPERATURE, float32)
    if -max_lanes(-lowest_unit(words)) > highest_unit(scaled, peek(cut + BAR, float32)):
        return -INFINITY
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
def finish_row(a, records, r, scratch, C):
    """Writes a row's token, its log-probability, and the likeliest tokens."""
    record, logits, maxima, V = records + RECORD_BYTES * r, plain(a, r), scratch, a.vocab_size
    if is_adjusted(record):
        maxima = unadjusted(scratch, C)
    largest, total, token = row_maximum(maxima, C), ZERO, int64(peek(record + GIVEN, int32)) - 1
    sound = is_sound(maxima, C)
    for c in range(C):
        top = max_lanes(load(maxima + WORD * BLOCKS * c)) + ZERO
        total = fma(peek(maxima + SUM * C + WORD * c, float32), exp(top - largest), total)
    if token < 0:
        token = chosen(choice(a, records, r), V, record, scratch, C)
    logprob = UNKNOWN
    if sound and is_sound(scratch, C):
        logprob = (peek(logits + WORD * token, float32) - largest) - log(total)
    poke(a.token + WORD * r, np.int32(token))
    poke(a.logprob + WORD * r, logprob)
    tokens, logprobs = a.top_token + TOP_BYTES * r, a.top_logprob + TOP_BYTES * r
    num_logprobs = peek(record + NUM_LOGPROBS, int32)
    if num_logprobs > 0 and sound:
        top_logprobs(Row(logits, V, maxima, C), num_logprobs, largest, log(total), tokens, logprobs)
    elif num_logprobs > 0:
        no_logprobs(min(int64(num_logprobs), V), tokens, logprobs)


@inlined
def no_logprobs(num_logprobs, tokens, logprobs):
    """Writes tokens 0, 1, ... without log-probabilities, for a row that is not sound."""
    for n in range(num_logprobs):
        poke(tokens + WORD * n, np.int32(n))
        poke(logprobs + WORD * n, UNKNOWN)


@inlined
def chosen(logits, V, record, scratch, C):
    """The best of the chunks' tokens, or the first of the largest logits; 0 in a row that is not sound."""
    token, best = int64(0), LOWEST
    if not is_sound(scratch, C):
        return token
    if not has_scores(record, scratch, C):
        largest = row_maximum(scratch, C)
        return first_equal(logits, int64(0), block_of(scratch, V, largest), V, largest)
    for c in range(C):
        if peek(scratch + BEST * C + WORD * c, float32) > best:
            best = peek(scratch + BEST * C + WORD * c, float32)
            token = int64(peek(scratch + TOKEN * C + WORD * c, int32))
    return token


@inlined
def unit(words):
    """The u of `gumbel`, without its last rounding."""
    return to_f32(shift_right(words, 1)) * TO_UNIT


@inlined
def highest_unit(scaled, bar):
    """No token of at most this scaled logit, and with a larger u than this, has a score of bar.

    For noise is at most -log(u). The slack is more than the roundings of noise and score.
    """
    slack = fma(absolute(bar), RELATIVE_SLACK, SLACK)
    return exp(minimum(scaled - bar + slack, ZERO))


@inlined
def top_logprobs(row, num_logprobs, largest, log_total, tokens, logprobs):
    """Writes the likeliest tokens and their log-probabilities: only blocks that can hold one of them are read."""
    logits, V, maxima, C = row
    num_logprobs = min(int64(num_logprobs), V)
    bound, num_found = block_bound(maxima, C, num_logprobs), int64(0)
    if bound <= LOWEST:  # there are fewer blocks, or fewer finite logits, than are asked for
        bound = -INFINITY
    for b in range(0, V, BLOCK):
        if peek(maxima + WORD * (b // BLOCK), float32) < bound:
            continue
        for g in range(b, min(b + BLOCK, V), 16):
            if max_lanes(entries(logits, g, V)) < bound:
                continue
            for i in range(g, min(g + 16, V)):
                x = peek(logits + WORD * i, float32)
                if x >= bound and (num_found < num_logprobs or x > peek(logprobs + WORD * (num_logprobs - 1), float32)):
                    num_found = min(num_found + 1, num_logprobs)
                    insert(x, i, num_found, tokens, logprobs)
    for n in range(num_logprobs):
        poke(logprobs + WORD * n, (peek(logprobs + WORD * n, float32) - largest) - log_total)


@inlined
def insert(x, i, num_entries, tokens, values):
    """Inserts token i behind all values of at least x; the last of num_entries entries is lost."""
    at = WORD * (num_entries - 1)
    while at > 0 and peek(values + at - WORD, float32) < x:
        poke(values + at, peek(values + at - WORD, float32))
        poke(tokens + at, peek(tokens + at - WORD, int32))
        at -= WORD
    poke(values + at, x)
    poke(tokens + at, np.int32(i))


@inlined
def block_of(maxima, V, largest):
    """First token of the first block that holds the largest logit."""
    for b in range(0, V, BLOCK):
        if peek(maxima + WORD * (b // BLOCK), float32) == largest:
            return b
    return V


@inlined
def first_equal(values, start, first, end, x):
    """The lowest index in first .. end - 1 whose value is x, or 0; values: the address of the value of index start."""
    for i in range(first, end):
        if peek(values + 4 * (i - start), float32) == x:
            return i
    return int64(0)


CPU = {"sample": Implementation(sample, waits=True)}
