"""Attention over the 8-bit cache, its sums exact integer dots: the definition. What it computes is in `attention`.

    score_j = (q_scale * k_scale_j) * (q_codes . k_codes_j)
    out    += w_scale * sum_j w_codes_j v_codes_j        of a block, where w_j = 2**(score_j - maximum) * v_scale_j

Queries are quantized to 8 bits, each head by itself; the weights w to 15 bits, each block of 64 keys by itself: they
cost what bfloat16 weights would, and the error of 8 bits would show where one key outweighs the others of its block.
"""

from typing import NamedTuple

import numpy as np
from numba import int64

from lockstep.ops.activations import HIGHEST, INFINITY, ONE_127TH, SMALLEST, magnitude
from lockstep.ops.attention import attend_all, first_seen, merge
from lockstep.ops.attention_math import BLOCK, ONE, SPAN, ZERO, cleared, exp2, first_key, soft_capped
from lockstep.ops.kv_cache import PAGE_TOKENS
from lockstep.ops.kv_cache_q8 import head_place, read_key, read_value
from lockstep.ops.reduce import tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.simd import fma, maximum, rint, to_f32, to_i32
from lockstep.runtime.step import entry, pages_of

MOST, ONE_MOST = np.float32(32767), np.float32(1 / 32767)  # of a weight's codes, so that pairs of int16 can hold them


class Quantized(NamedTuple):
    """Codes int8 with their scales float32: a query's [K] with one, or keys or values [C, K] with one each, [C]."""

    codes: np.ndarray
    scale: np.ndarray | np.float32


@definition
def attend(q_K, k, v, position, window, scales, out_K):
    """One query head at one position over a sequence's keys and values; returns the maximum and the sum of its softmax.

    Shapes: q, out [K] float32; k, v Quantized [C, K], C > position; window as in `attention.attend`.
    Units: as in `attention.attend`.
    Error: half a code of q, amax / 254, and 2**-16 of a block's largest weight. For standard normal q, k and v this is
      0.5 % of the float64 result (rms), and 1 % counted from the numbers before they were cached (bfloat16: 0.3 %).
    Order: q * scale, cleared, then `quantize_query`. Keys in spans of 1024, merged as in `attention.attend`.
    Source: as `attention.attend`; the scales of blocks as in SageAttention, Zhang et al. 2024.
    """
    first, (scale, cap) = first_key(position, window), scales
    top, total, span_K, codes_K = ZERO, ZERO, np.empty(out_K.size, np.float32), np.empty(out_K.size, np.int8)
    q = Quantized(codes_K, quantize_query(q_K, scale, codes_K))
    for span in range(first // SPAN, position // SPAN + 1):
        start, stop = max(first, span * SPAN), min(position + 1, (span + 1) * SPAN)
        span_top, span_total = attend_span(q, k, v, start, stop, cap, span_K)
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
def attend_span(q, k, v, start, stop, cap, out_K):
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
            weight[j - low] = score_of(q.codes, q.scale, k.codes[j], k.scale[j], cap)
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
            weight[j - low] = p * v.scale[j]
        add_values(weight[: high - low], v.codes[low:high], out_K)
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


@inlined
def sequence(a, batch, request, g):
    """Keys and values of one kv head of a request, gathered from its pages: k, v Quantized [C, K]. See
    `attention.sequence`."""
    G, K, length = a.num_kv_heads, a.head_dim, entry(batch.context_len, request)
    k = Quantized(np.empty((length, K), np.int8), np.empty(length, np.float32))
    v = Quantized(np.empty((length, K), np.int8), np.empty(length, np.float32))
    table = pages_of(batch, request, a.page_group)
    for position in range(first_seen(a, batch, request), length):
        head = head_place(entry(table, position // PAGE_TOKENS), g, G, K)
        k.scale[position] = read_key(a.k_pages + head, position % PAGE_TOKENS, k.codes[position])
        v.scale[position] = read_value(a.v_pages + head, position % PAGE_TOKENS, v.codes[position])
    return k, v


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        attend_all(op, step, sequence, attend, ())


REFERENCE = {"attention_q8": Implementation(_run)}
