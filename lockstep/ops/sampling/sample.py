"""The choice of the next token from a row of logits, and its log-probability: the definition.

    token[r] = argmax over the kept tokens i of  adjusted[r, i] / temperature + gumbel(seed, position, i)

which is a draw from the softmax, and a function of nothing but the row and its record: no generator has a state.
Log-probabilities are the model's own: of the logits before adjustment, temperature and what is kept.

A row with a logit that is NaN or +inf, which only a broken model or machine makes, has no softmax: its token is 0, its
likeliest tokens are 0, 1, 2, ..., and every log-probability is NaN, which tells the engine. Whatever the logits are, a
token is one of the vocabulary.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray, float32, int32, int64
from lockstep.native.simd import absolute, fma, maximum, minimum, peek, poke, rint, to_i32
from lockstep.ops.math import ZERO, exp, log, tree_sum
from lockstep.ops.sampling.philox import noise
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import StepBlock, num_rows

CHUNK = 4096  # vocabulary entries per partial sum of the log-softmax: a numerics constant
BLOCK = 256  # vocabulary entries per maximum that the fast kernel keeps
MAX_LOGPROBS = 20  # alternatives that a row may ask for
LOWEST, INFINITY = np.float32(-3.4028235e38), np.float32(np.inf)
UNKNOWN = np.float32(np.nan)  # a log-probability of a row that has none
WEIGHT_UNITS = np.float32(2**30)  # the weight of the likeliest token

# adjustment, mask, num_seen, num_banned: see `adjust_logits`; adjustment 0: the row's logits are taken as they are.
# given: 0, or 1 + the id of a token that is known, not chosen, and whose log-probability is reported.
SAMPLING_RECORD = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("seed", np.int64),
        ("position", np.int64),
        ("adjustment", np.int64),
        ("mask", np.int64),
        ("num_seen", np.int32),
        ("num_banned", np.int32),
        ("given", np.int32),
        ("num_logprobs", np.int32),
    ]
)
RECORD_BYTES = SAMPLING_RECORD.itemsize
TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED, POSITION, ADJUSTMENT, MASK, NUM_SEEN, NUM_BANNED, GIVEN, NUM_LOGPROBS = (
    SAMPLING_RECORD.fields[name][1] for name in SAMPLING_RECORD.names
)


class Sample(Operands):
    """A token for each row, its log-probability, and the likeliest tokens with theirs, likeliest first.

    logits, and adjusted in rows with an adjustment: rows `width` wide, of which the first vocab_size are tokens.
    """

    rules = ("vocab_size <= width",)
    token: Tensor = output("1", dtype="i32")
    logprob: Tensor = output("1")
    top_token: Tensor = output(f"{MAX_LOGPROBS}", dtype="i32", on_request=True)
    top_logprob: Tensor = output(f"{MAX_LOGPROBS}", on_request=True)
    scratch: Tensor = output("scratch_width", scratch=True)
    logits: Tensor = rows("width")
    adjusted: Tensor = rows("width")
    vocab_size: int
    width: int
    scratch_width: int

    def check(self):
        if self.scratch_width != scratch_width(self.vocab_size):
            expected = f"{scratch_width(self.vocab_size)} for {self.vocab_size} tokens"
            raise ValueError(f"Sample: scratch_width is {self.scratch_width}, expected {expected}")


def scratch_width(vocabulary):
    """Width of the output `scratch`, where the fast kernel keeps partial results."""
    chunks = -(-vocabulary // CHUNK)
    return chunks * (2 * (CHUNK // BLOCK) + 6) + 16


@definition
def sample_row(logits_V, temperature, top_k, top_p, min_p, seed, position):
    """Chooses a token.

    Shapes: logits [V] float32, V below 2**23; -inf forbids a token; a row that is not sound gives token 0.
    Units: temperature 0 takes the largest logit (as does a row that forbids all, or whose largest logit / temperature
      overflows), otherwise it is at least 1e-3; top_k below 1, top_p 1 and min_p 0 restrict nothing. top_k counts
      tokens, top_p is a share of what top_k leaves, min_p is relative to the likeliest token.
    Order: ties go to the lowest index. `kept_token` says the rest.
    Source: Maddison, Tarlow and Minka 2014 (Gumbel argmax); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).
    """
    if not is_sound(logits_V):
        return 0
    largest = maximum_of(logits_V)
    if temperature == ZERO or largest == LOWEST or absolute(largest / temperature) == INFINITY:
        return argmax(logits_V)
    return kept_token(logits_V, temperature, top_k, top_p, min_p, seed, position)


@definition
def report(logits_V, token, num_logprobs, top_token_N, top_logprob_N):
    """Log-probability of a token under the softmax of the logits themselves, and the likeliest tokens with theirs.

    Shapes: logits [V] as for `sample_row`; top_token [N] int32 and top_logprob [N] float32, of which the first
      min(num_logprobs, V) are written, likeliest first; ties go to the lowest index.
    Error: below 3e-6 + 1 ulp.
    Order: (logit - largest) - log(sum); see `log_normalizer`. NaN throughout for a row that is not sound.
    """
    if not is_sound(logits_V):
        for n in range(min(num_logprobs, logits_V.size)):
            top_token_N[n], top_logprob_N[n] = n, UNKNOWN
        return UNKNOWN
    largest, log_total = log_normalizer(logits_V)
    if num_logprobs > 0:
        order = descending(logits_V)
        for n in range(min(num_logprobs, logits_V.size)):
            top_token_N[n] = order[n]
            top_logprob_N[n] = (logits_V[order[n]] - largest) - log_total
    return (logits_V[token] - largest) - log_total


@definition
def is_sound(logits_V):
    """Whether no logit is NaN or +inf."""
    for i in range(logits_V.size):
        if not logits_V[i] < INFINITY:
            return False
    return True


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

    Tokens are visited by (logit descending, index ascending). Of the first top_k, a token is kept if the weights before
    it sum to less than top_p of all, and its logit is near enough to the largest (min_p). Weights are integers, so that
    their sums are exact and have no order.
    """
    order = descending(logits_V)
    num_visited = top_k if 0 < top_k < logits_V.size else logits_V.size
    largest = logits_V[order[0]] / temperature
    limit, floor = weight_limit(logits_V, order[:num_visited], temperature, largest, top_p), lowest_offset(min_p)
    token, best, before = order[0], LOWEST, np.int64(0)
    for i in order[:num_visited]:
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
    """The weight that tokens before a kept one stay below; the first token is always kept."""
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
def log_normalizer(logits_V):
    """The largest logit, and the logarithm of the sum of exp(logit - largest).

    Order: chunks of 4096 by index; in a chunk, exp(logit - its maximum) summed in 16 lanes and a tree; the sums, each
    times exp(its maximum - the largest of all), added by FMA in ascending order.
    """
    largest, total = maximum_of(logits_V), ZERO
    lane = np.empty(16, np.float32)
    for first in range(0, logits_V.size, CHUNK):
        chunk = logits_V[first : first + CHUNK]
        top = maximum_of(chunk)
        lane[:] = ZERO
        for i in range(chunk.size):
            lane[i % 16] += exp(chunk[i] - top)
        total = fma(tree_sum(lane), exp(top - largest), total)
    return largest, log(total)


@definition
def maximum_of(x):
    """The largest finite value; +0 where it is a zero."""
    largest = LOWEST
    for i in range(x.size):
        largest = maximum(x[i], largest)
    return largest + ZERO


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, N = Sample.read(op), MAX_LOGPROBS
        for r in range(num_rows(op, step)):
            record, row = StepBlock.read(step).sampling + RECORD_BYTES * r, 4 * a.width * r
            logits_V = carray(float_array(a.logits + row), (a.vocab_size,))
            adjusted = peek(record + ADJUSTMENT, int64) != 0
            choice_V = carray(float_array(a.adjusted + row), (a.vocab_size,)) if adjusted else logits_V
            token = int64(peek(record + GIVEN, int32)) - 1
            if token < 0:
                token = sample_row(
                    choice_V,
                    peek(record + TEMPERATURE, float32),
                    peek(record + TOP_K, int32),
                    peek(record + TOP_P, float32),
                    peek(record + MIN_P, float32),
                    peek(record + SEED, int64),
                    peek(record + POSITION, int64),
                )
            logprob = report(
                logits_V,
                token,
                peek(record + NUM_LOGPROBS, int32),
                carray(int_array(a.top_token + 4 * N * r), (N,)),
                carray(float_array(a.top_logprob + 4 * N * r), (N,)),
            )
            poke(a.token + 4 * r, np.int32(token))
            poke(a.logprob + 4 * r, logprob if is_sound(choice_V) else UNKNOWN)


REFERENCE = {"sample": Implementation(_run)}
