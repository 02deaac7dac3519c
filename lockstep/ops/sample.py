"""The choice of the next token from a row of logits: the definition.

    token[r] = argmax over the kept tokens i of  logits[r, i] / temperature + gumbel(seed, position, i)

which is a draw from the softmax, and a function of nothing but the row and its record: no generator has a state.
"""
import numpy as np
from numba import carray, float32, int32, int64

from lockstep.ops.math import exp, log
from lockstep.ops.philox import noise
from lockstep.ops.reduce import tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.simd import fma, maximum, minimum, peek, poke, rint, to_i32
from lockstep.runtime.step import SAMPLING, num_rows, step_word, word

CHUNK = 4096  # vocabulary entries per partial sum of the log-softmax: a numerics constant
BLOCK = 256  # vocabulary entries per maximum that the fast kernel keeps
LOWEST, ZERO = np.float32(-3.4028235e38), np.float32(0)
WEIGHT_UNITS = np.float32(2**30)  # in one weight of the likeliest token

SAMPLING_RECORD = np.dtype([
    ("temperature", np.float32), ("top_p", np.float32), ("min_p", np.float32), ("top_k", np.int32),
    ("seed", np.int64), ("position", np.int64), ("reserved", np.uint8, 28), ("num_logprobs", np.int32)])
RECORD_BYTES = SAMPLING_RECORD.itemsize
TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED, POSITION = (
    SAMPLING_RECORD.fields[name][1] for name in ("temperature", "top_p", "min_p", "top_k", "seed", "position"))


def scratch_width(vocabulary):
    """Width of the op's third output (float32, rows "R"), where the fast kernel keeps partial results."""
    chunks = -(-vocabulary // CHUNK)
    return chunks * (CHUNK // BLOCK + 5) + 16


@definition
def sample_row(logits_V, temperature, top_k, top_p, min_p, seed, position):
    """Chooses a token; returns it and the logarithm of its probability under the softmax of the logits themselves.

    Shapes: logits [V] float32 without NaN or +inf, V below 2**23; -inf forbids a token.
    Units: temperature 0 takes the largest logit (as does a row that forbids all), otherwise it is at least 1e-3; top_k
      below 1, top_p 1 and min_p 0 restrict nothing. top_k counts tokens, top_p is a share of what top_k leaves, min_p
      is relative to the likeliest token.
    Error: logprob below 3e-6 + 1 ulp.
    Order: ties go to the lowest index. `kept_token` and `log_probability` say the rest.
    Source: Maddison, Tarlow and Minka 2014 (Gumbel argmax); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
    """
    if temperature == ZERO or maximum_of(logits_V) == LOWEST:
        token = argmax(logits_V)
    else:
        token = kept_token(logits_V, temperature, top_k, top_p, min_p, seed, position)
    return token, log_probability(logits_V, token)


@definition
def argmax(logits_V):
    """Index of the largest logit."""
    token = 0
    for i in range(logits_V.size):
        if logits_V[i] > logits_V[token]:
            token = i
    return token


@definition
def kept_token(logits_V, temperature, top_k, top_p, min_p, seed, position):
    """The kept token of highest score.

    Tokens are visited by (logit descending, index ascending). Of the first top_k, those are kept before which the
    weights sum to less than top_p of all, and whose logit is near enough to the largest. Weights are integers, so that
    their sums are exact and have no order.
    """
    order = descending(logits_V)
    count = top_k if 0 < top_k < logits_V.size else logits_V.size
    largest = logits_V[order[0]] / temperature
    limit, floor = weight_limit(logits_V, order[:count], temperature, largest, top_p), lowest_offset(min_p)
    token, best, before = order[0], LOWEST, np.int64(0)
    for i in order[:count]:
        scaled = logits_V[i] / temperature
        if before >= limit or scaled - largest < floor:
            break
        score = scaled + noise(seed, position, i)
        if score > best or (score == best and i < token):
            best, token = score, i
        before += token_weight(scaled, largest)
    return token


@definition
def descending(logits_V):
    """Indices by (logit descending, index ascending): a merge sort of runs of 1, 2, 4, ..."""
    order, merged, run = np.arange(logits_V.size), np.empty(logits_V.size, np.int64), 1
    while run < order.size:
        for first in range(0, order.size, 2 * run):
            middle, last = min(first + run, order.size), min(first + 2 * run, order.size)
            left, right = first, middle
            for at in range(first, last):
                take_left = left < middle and (right == last or logits_V[order[left]] >= logits_V[order[right]])
                merged[at] = order[left] if take_left else order[right]
                left, right = (left + 1, right) if take_left else (left, right + 1)
        order, merged, run = merged, order, 2 * run
    return order


@definition
def weight_limit(logits_V, tokens, temperature, largest, top_p):
    """How much weight may lie before a kept token; the first token is always kept."""
    total = np.int64(0)
    for i in tokens:
        total += token_weight(logits_V[i] / temperature, largest)
    return nucleus(total, top_p)


@inlined
def nucleus(total, top_p):
    """top_p of a total weight, at least 1, as float64; any weight where top_p restricts nothing."""
    share = np.float64(total) * np.float64(top_p)
    return max(share, 1.0) if top_p < 1 else 1e300


@inlined
def token_weight(scaled, largest):
    """exp(scaled - largest) in units of 2**-30, rounded to an integer."""
    return np.int64(to_i32(rint(exp(scaled - largest) * WEIGHT_UNITS)))


@inlined
def lowest_offset(min_p):
    """The logarithm of min_p, at most 0: how far a scaled logit may lie below the largest."""
    return minimum(log(min_p), ZERO) if min_p > ZERO else LOWEST


@definition
def log_probability(logits_V, token):
    """log softmax of one token.

    Order: chunks of 4096 by index; in a chunk, exp(logit - its maximum) summed in 16 lanes and a tree; the sums, each
    times exp(its maximum - the largest of all), added by FMA in ascending order; then (logit - largest) - log(sum).
    """
    largest, total = maximum_of(logits_V), ZERO
    lane = np.empty(16, np.float32)
    for first in range(0, logits_V.size, CHUNK):
        chunk = logits_V[first:first + CHUNK]
        top = maximum_of(chunk)
        lane[:] = ZERO
        for i in range(chunk.size):
            lane[i % 16] += exp(chunk[i] - top)
        total = fma(tree_sum(lane), exp(top - largest), total)
    return (logits_V[token] - largest) - log(total)


@definition
def maximum_of(x):
    """The largest finite value; +0 where it is a zero."""
    largest = LOWEST
    for i in range(x.size):
        largest = maximum(x[i], largest)
    return largest + ZERO


@kernel
def _run(op, step, thread, num_threads):
    """Op row: token, logprob, scratch, logits, V, width of a row of logits."""
    if thread == 0:
        V = word(op, 4)
        for r in range(num_rows(op, step)):
            logits_V = carray(float_array(word(op, 3) + 4 * word(op, 5) * r), (V,))
            record = step_word(step, SAMPLING) + RECORD_BYTES * r
            token, logprob = sample_row(
                logits_V, peek(record + TEMPERATURE, float32), peek(record + TOP_K, int32),
                peek(record + TOP_P, float32), peek(record + MIN_P, float32), peek(record + SEED, int64),
                peek(record + POSITION, int64))
            poke(word(op, 0) + 4 * r, np.int32(token))
            poke(word(op, 1) + 4 * r, logprob)


REFERENCE = {"sample": Implementation(_run)}
