"""Attention over the 8-bit cache, its sums exact integer dots: the definition. What it computes is in `attention`.

    score_j = (q_scale * k_scale_j) * (q_codes . k_codes_j)
    out    += w_scale * sum_j w_codes_j v_codes_j        of a block, where w_j = 2**(score_j - maximum) * v_scale_j

Queries are quantized to 8 bits, each head by itself; the weights w to 15 bits, each block of 64 keys by itself: they
cost what bfloat16 weights would, and the error of 8 bits would show where one key outweighs the others of its block.
"""

import numpy as np
from numba import carray, int64

from lockstep.ops.activations import HIGHEST, INFINITY, ONE_127TH, SMALLEST, magnitude
from lockstep.ops.attention import gated, merge
from lockstep.ops.attention_math import BLOCK, ONE, SPAN, ZERO, cleared, exp2, score_scales, soft_capped
from lockstep.ops.kv_cache import PAGE_TOKENS
from lockstep.ops.kv_cache_q8 import head_place, read_key, read_value
from lockstep.ops.reduce import tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.simd import fma, maximum, rint, to_f32, to_i32
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

MOST, ONE_MOST = np.float32(32767), np.float32(1 / 32767)  # of a weight's codes, so that pairs of int16 can hold them


@definition
def attend(q_K, k_CK, k_scale_C, v_CK, v_scale_C, position, window, scale, cap, out_K):
    """One query head at one position over a sequence's keys and values; returns the maximum and the sum of its softmax.

    Shapes: q, out [K] float32; k, v [C, K] int8, their scales [C], C > position; window as in `attention.attend`.
    Units: as in `attention.attend`.
    Error: half a code of q, amax / 254, and 2**-16 of a block's largest weight. For standard normal q, k and v this is
      0.5 % of the float64 result (rms), and 1 % counted from the numbers before they were cached (bfloat16: 0.3 %).
    Order: q * scale, cleared, then `quantize_query`. Keys in spans of 1024, merged as in `attention.attend`.
    Source: as `attention.attend`; the scales of blocks as in SageAttention, Zhang et al. 2024.
    """
    first = max(0, position + 1 - window) if window > 0 else 0
    top, total, span_K, codes_K = ZERO, ZERO, np.empty(out_K.size, np.float32), np.empty(out_K.size, np.int8)
    q_scale = quantize_query(q_K, scale, codes_K)
    for span in range(first // SPAN, position // SPAN + 1):
        start, stop = max(first, span * SPAN), min(position + 1, (span + 1) * SPAN)
        span_top, span_total = attend_span(codes_K, q_scale, k_CK, k_scale_C, v_CK, v_scale_C, start, stop, cap, span_K)
        top, total = merge(top, total, out_K, span_top, span_total, span_K, span == first // SPAN)
    for d in range(out_K.size):
        out_K[d] = cleared(out_K[d] / total)
    return top, total


@definition
def quantize_query(q_K, scale, codes_K):
    """Codes of q * scale; returns their scale.

    Order: x = cleared(q * scale); amax exactly; the scale is amax * (1 / 127), a code rint(x * (127 / amax)), ties to
      even. With amax < 1e-30 scale and codes are zero; with a NaN or an infinity the codes are, and the scale is
      infinite.
    """
    amax = ZERO
    for d in range(q_K.size):
        amax = maximum(magnitude(cleared(q_K[d] * scale)), amax)
    if amax == INFINITY:
        codes_K[:] = np.int8(0)
        return INFINITY
    if amax < SMALLEST:
        codes_K[:] = np.int8(0)
        return ZERO
    inverse = HIGHEST / amax
    for d in range(q_K.size):
        codes_K[d] = np.int8(to_i32(rint(cleared(q_K[d] * scale) * inverse)))
    return amax * ONE_127TH


@definition
def attend_span(q_K, q_scale, k_CK, k_scale_C, v_CK, v_scale_C, start, stop, cap, out_K):
    """Keys start..stop of one span: out = sum of 2**(score - maximum) v, not yet divided; returns maximum and sum.

    Order: keys in blocks of 64 at absolute positions. In a block: the scores; the new maximum of all keys so far; where
      it grew, out and the 16 lanes of the sum are multiplied by 2**(old - new) and cleared; then the weights,
      p = 2**(score - maximum), key by key: lane j % 16 += p; then `add_values`. At the end the lanes by `tree_sum`.
    """
    lane, weight, top = np.empty(16, np.float32), np.empty(BLOCK, np.float32), ZERO
    for i in range(16):
        lane[i] = ZERO
    for d in range(out_K.size):
        out_K[d] = ZERO
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        for j in range(low, high):
            weight[j - low] = score_of(q_K, q_scale, k_CK[j], k_scale_C[j], cap)
        highest = weight[0]
        for i in range(1, high - low):
            highest = maximum(weight[i], highest)
        higher = highest + ZERO if low == start else maximum(highest, top) + ZERO  # + 0: one zero, not two
        shrink = exp2(top - higher) if low > start else ONE
        top = higher
        for i in range(16):
            lane[i] = cleared(lane[i] * shrink)
        for d in range(out_K.size):
            out_K[d] = cleared(out_K[d] * shrink)
        for j in range(low, high):
            p = exp2(weight[j - low] - top)
            lane[j % 16] = lane[j % 16] + p
            weight[j - low] = p * v_scale_C[j]
        add_values(weight[: high - low], v_CK[low:high], out_K)
    return top, tree_sum(lane)


@definition
def score_of(q_K, q_scale, k_K, k_scale, cap):
    """The score of one key, in units of log 2: the exact dot * (q_scale * k_scale); soft cap as in `attention`."""
    dot = int64(0)
    for d in range(q_K.size):
        dot += int64(q_K[d]) * int64(k_K[d])
    score = np.float32(dot) * (q_scale * k_scale)
    if cap > ZERO:
        score = soft_capped(score, cap)
    return score


@definition
def add_values(weight_J, v_JK, out_K):
    """out += sum of weight[j] v[j] over the seen keys of a block, whose weights it quantizes.

    Order: the largest weight w exactly; scale = w * (1 / 32767); a code is rint(weight * (32767 / w)), ties to even, or
      0 if w < 1e-30; out = fma(float(exact dot, to nearest even), scale, out).
    """
    most = ZERO
    for j in range(weight_J.size):
        most = maximum(weight_J[j], most)
    if most < SMALLEST:
        return
    inverse, scale, codes = MOST / most, most * ONE_MOST, np.empty(weight_J.size, np.int64)
    for j in range(weight_J.size):
        codes[j] = to_i32(rint(weight_J[j] * inverse))
    for d in range(out_K.size):
        dot = int64(0)
        for j in range(weight_J.size):
            dot += codes[j] * int64(v_JK[j, d])
        out_K[d] = fma(to_f32(np.int32(dot)), scale, out_K[d])


@definition
def sequence(step, request, g, length, G, K, k_pages, v_pages):
    """One kv head of a request, gathered from its pages: keys [C, K], their scales [C], values, their scales."""
    k_CK, v_CK = np.empty((length, K), np.int8), np.empty((length, K), np.int8)
    k_scale_C, v_scale_C = np.empty(length, np.float32), np.empty(length, np.float32)
    first_page = request * step_word(step, PAGES_PER_REQUEST)
    for position in range(length):
        head = head_place(entry(step, PAGE_TABLE, first_page + position // PAGE_TOKENS), g, G, K)
        k_scale_C[position] = read_key(k_pages + head, position % PAGE_TOKENS, k_CK[position])
        v_scale_C[position] = read_value(v_pages + head, position % PAGE_TOKENS, v_CK[position])
    return k_CK, k_scale_C, v_CK, v_scale_C


@definition
def _attention(op, step, base, has_gate):
    """The op on all requests; operands and parameters as in `attention`."""
    G, K = word(op, base + 1), word(op, base + 2)
    for s in range(step_word(step, NUM_REQUESTS)):
        start, stop, length = entry(step, QUERY_START, s), entry(step, QUERY_START, s + 1), entry(step, CONTEXT_LEN, s)
        for g in range(G):
            k_CK, k_scale_C, v_CK, v_scale_C = sequence(step, s, g, length, G, K, word(op, 3), word(op, 4))
            for t in range(start, stop):
                _attend_group(op, base, has_gate, t, length - (stop - t), g, k_CK, k_scale_C, v_CK, v_scale_C)


@definition
def _attend_group(op, base, has_gate, t, position, g, k_CK, k_scale_C, v_CK, v_scale_C):
    """All query heads of token t that read kv head g."""
    H, G, K, window = word(op, base), word(op, base + 1), word(op, base + 2), word(op, base + 4)
    scale, cap = score_scales(number(op, base + 3), number(op, base + 5))
    stats_H2 = carray(float_array(word(op, 1) + 8 * H * t), (H, 2))
    for h in range(g * (H // G), (g + 1) * (H // G)):
        at = 4 * K * (H * t + h)
        q_K, out_K = carray(float_array(word(op, 2) + at), (K,)), carray(float_array(word(op, 0) + at), (K,))
        stats_H2[h, 0], stats_H2[h, 1] = attend(
            q_K, k_CK, k_scale_C, v_CK, v_scale_C, position, window, scale, cap, out_K
        )
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


REFERENCE = {"attention_q8": Implementation(_run), "gated_attention_q8": Implementation(_run_gated)}
