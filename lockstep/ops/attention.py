"""Causal attention of queries over the keys and values of their sequence: the definition.

    out[h] = sum_j softmax_j(sm_scale * q[h] . k[j]) v[j]      position - window < j <= position

where query head h reads the keys and values of kv head h // (H / G).

The arithmetic depends only on the query's own position and keys: never on its batch, chunk or page placement.
"""

import numpy as np
from numba import carray

from lockstep.ops.attention_math import BLOCK, ONE, SPAN, ZERO, cleared, exp2, score_scales, soft_capped
from lockstep.ops.kv_cache import PAGE_TOKENS, k_index, read_number, v_index
from lockstep.ops.linear import dot_bf16, flushed_fma
from lockstep.ops.math import sigmoid
from lockstep.ops.reduce import tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.simd import fma, maximum, round_bf16
from lockstep.runtime.step import (
    CONTEXT_LEN,
    NUM_REQUESTS,
    PAGE_TABLE,
    PAGES_PER_REQUEST,
    QUERY_START,
    entry,
    number,
    step_word,
    word,
)


@definition
def attend(q_K, k_CK, v_CK, position, window, scale, cap, pairs, out_K):
    """One query head at one position over a sequence's keys and values; returns the maximum and the sum of its softmax.

    Shapes: q, out [K]; k, v [C, K] float32, C > position; window 0: all keys up to position, else the last `window`.
      pairs: k and v are bfloat16 values, and q and the weights are rounded to bfloat16, too.
    Units: scale, cap from `score_scales`; the maximum is a score in units of log 2, sum = sum of 2**(score - maximum).
    Error: 2e-6 of the float64 result for scores below 20 and |v| < 4, up to 2048 keys; with pairs 2**-9 of a score and
      of each weight, as in every attention that multiplies bfloat16.
    Order: q * scale (cleared; with pairs rounded). Keys in spans of 1024 at absolute positions 0, 1024, ...:
      `attend_span` each, merged in ascending order: with M the larger maximum, a = 2**(m1 - M), b = 2**(m2 - M):
      sum = fma(sum1, a, sum2 * b), out = fma(out1, a, out2 * b). Last, out / sum. out2 * b and whatever goes to out are
      `cleared`.
    Source: online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022.
    """
    first = max(0, position + 1 - window) if window > 0 else 0
    top, total, span_K, scaled_K = ZERO, ZERO, np.empty(out_K.size, np.float32), np.empty(out_K.size, np.float32)
    for d in range(q_K.size):
        scaled_K[d] = rounded(cleared(q_K[d] * scale), pairs)
    for span in range(first // SPAN, position // SPAN + 1):
        start, stop = max(first, span * SPAN), min(position + 1, (span + 1) * SPAN)
        span_top, span_total = attend_span(scaled_K, k_CK, v_CK, start, stop, cap, pairs, span_K)
        top, total = merge(top, total, out_K, span_top, span_total, span_K, span == first // SPAN)
    for d in range(out_K.size):
        out_K[d] = cleared(out_K[d] / total)
    return top, total


@definition
def merge(top, total, out_K, span_top, span_total, span_K, is_first):
    """A span joins what earlier spans left in out (see `attend`); returns the new maximum and sum."""
    if is_first:
        for d in range(out_K.size):
            out_K[d] = span_K[d]
        return span_top, span_total
    higher = maximum(span_top, top)
    a, b = exp2(top - higher), exp2(span_top - higher)
    for d in range(out_K.size):
        out_K[d] = cleared(fma(out_K[d], a, cleared(span_K[d] * b)))
    return higher, fma(total, a, span_total * b)


@inlined
def rounded(x, pairs):
    """x, as a bfloat16 if it becomes part of a pair."""
    return round_bf16(x) if pairs else x


@definition
def attend_span(q_K, k_CK, v_CK, start, stop, cap, pairs, out_K):
    """Keys start..stop of one span: out = sum of 2**(score - maximum) v, not yet divided; returns maximum and sum.

    Order: keys in blocks of 64 at absolute positions. In a block: the scores; the new maximum of all keys so far; where
      it grew, out and the 16 lanes of the sum are multiplied by 2**(old - new) and cleared; then the weights,
      p = 2**(score - maximum) (with pairs rounded), key by key: lane j % 16 += p; then `add_values`. At the end the
      lanes by `tree_sum`.
    """
    lane, score, top = np.empty(16, np.float32), np.empty(BLOCK, np.float32), ZERO
    for i in range(16):
        lane[i] = ZERO
    for d in range(out_K.size):
        out_K[d] = ZERO
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        for j in range(low, high):
            score[j - low] = score_of(q_K, k_CK[j], cap, pairs)
        highest = score[0]
        for i in range(1, high - low):
            highest = maximum(score[i], highest)
        higher = highest + ZERO if low == start else maximum(highest, top) + ZERO  # + 0: one zero, not two
        shrink = exp2(top - higher) if low > start else ONE
        top = higher
        for i in range(16):
            lane[i] = cleared(lane[i] * shrink)
        for d in range(out_K.size):
            out_K[d] = cleared(out_K[d] * shrink)
        for j in range(low, high):
            score[j - low] = rounded(exp2(score[j - low] - top), pairs)
            lane[j % 16] = lane[j % 16] + score[j - low]
        add_values(score, v_CK, low, high, pairs, out_K)
    return top, tree_sum(lane)


@definition
def add_values(weight, v_CK, low, high, pairs, out_K):
    """out += sum of weight[j - low] v[j] over the keys low <= j < high of a block.

    Order: out = fma(p, v, out), key by key in ascending order. With pairs: an even key and the odd one after it, the
      odd one first, each step flushed: out = f(p0, v0, f(p1, v1, out)) with f = `linear.flushed_fma`; a key of a pair
      that is not among them counts as 0 times 0.
    """
    if not pairs:
        for j in range(low, high):
            for d in range(out_K.size):
                out_K[d] = fma(weight[j - low], v_CK[j, d], out_K[d])
        return
    for j in range(low - low % 2, high, 2):
        for d in range(out_K.size):
            p0, v0 = (weight[j - low], v_CK[j, d]) if j >= low else (ZERO, ZERO)
            p1, v1 = (weight[j + 1 - low], v_CK[j + 1, d]) if j + 1 < high else (ZERO, ZERO)
            out_K[d] = flushed_fma(p0, v0, flushed_fma(p1, v1, out_K[d]))


@definition
def score_of(q_K, k_K, cap, pairs):
    """The score of one key, in units of log 2, for a query that is scaled already.

    Order: a chain of fma over d ascending from +0; with pairs that of `linear.dot_bf16`. Then the soft cap if any
      (cap > 0): cap * (1 - 2 / (1 + 2**score)), the score being limited to 64 from above.
    """
    score = ZERO
    if pairs:
        score = dot_bf16(q_K, k_K)
    else:
        for d in range(q_K.size):
            score = fma(q_K[d], k_K[d], score)
    if cap > ZERO:
        score = soft_capped(score, cap)
    return score


@definition
def gated(out_K, gate_K):
    """out *= sigmoid(gate), the gate of gated attention."""
    for d in range(out_K.size):
        out_K[d] = cleared(out_K[d] * sigmoid(gate_K[d]))


@definition
def sequence(step, request, g, length, G, K, k_pages, v_pages, bf16):
    """Keys and values of one kv head of a request, gathered from its pages: (k [C, K], v [C, K]) with C = length."""
    k_CK, v_CK = np.empty((length, K), np.float32), np.empty((length, K), np.float32)
    first_page = request * step_word(step, PAGES_PER_REQUEST)
    for position in range(length):
        page = entry(step, PAGE_TABLE, first_page + position // PAGE_TOKENS)
        for d in range(K):
            k_CK[position, d] = read_number(k_pages, k_index(page, g, d, position % PAGE_TOKENS, G, K, bf16), bf16)
            v_CK[position, d] = read_number(v_pages, v_index(page, g, d, position % PAGE_TOKENS, G, K, bf16), bf16)
    return k_CK, v_CK


@definition
def _attention(op, step, base, has_gate):
    """The op on all requests.

    Operands: out, stats, q, K pages, V pages, with a gate also the rows that hold it. Parameters, from `base` on: H, G,
    K, sm_scale, window, soft cap, type of the pages (KV_DTYPES); of the gate the row's width, the first column, and the
    columns from one head to the next. stats [T, H, 2] float32 receives the maximum and the sum of each softmax.
    """
    G, K, bf16 = word(op, base + 1), word(op, base + 2), word(op, base + 6)
    for s in range(step_word(step, NUM_REQUESTS)):
        start, stop, length = entry(step, QUERY_START, s), entry(step, QUERY_START, s + 1), entry(step, CONTEXT_LEN, s)
        for g in range(G):
            k_CK, v_CK = sequence(step, s, g, length, G, K, word(op, 3), word(op, 4), bf16)
            for t in range(start, stop):
                _attend_group(op, base, has_gate, t, length - (stop - t), g, k_CK, v_CK)


@definition
def _attend_group(op, base, has_gate, t, position, g, k_CK, v_CK):
    """All query heads of token t that read kv head g."""
    H, G, K = word(op, base), word(op, base + 1), word(op, base + 2)
    window, pairs = word(op, base + 4), word(op, base + 6)
    scale, cap = score_scales(number(op, base + 3), number(op, base + 5))
    stats_H2 = carray(float_array(word(op, 1) + 8 * H * t), (H, 2))
    for h in range(g * (H // G), (g + 1) * (H // G)):
        at = 4 * K * (H * t + h)
        q_K, out_K = carray(float_array(word(op, 2) + at), (K,)), carray(float_array(word(op, 0) + at), (K,))
        stats_H2[h, 0], stats_H2[h, 1] = attend(q_K, k_CK, v_CK, position, window, scale, cap, pairs, out_K)
        if has_gate:
            width, offset, stride = word(op, base + 7), word(op, base + 8), word(op, base + 9)
            gate = word(op, 5) + 4 * (width * t + offset + stride * h)
            gated(out_K, carray(float_array(gate), (K,)))


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        _attention(op, step, 5, 0)


@kernel
def _run_gated(op, step, thread, num_threads):
    if thread == 0:
        _attention(op, step, 6, 1)


REFERENCE = {
    "attention": Implementation(_run),
    "gated_attention": Implementation(_run_gated),
    "attention_bf16": Implementation(_run),
    "gated_attention_bf16": Implementation(_run_gated),
}
