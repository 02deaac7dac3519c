"""Attention over the 8-bit cache, by exact integer dots: the definition. The formula of attention is in `attention`.

    score_j = (q_scale * k_scale_j) * (q_codes . k_codes_j)
    out    += w_scale * sum_j w_codes_j v_codes_j        for each block, where w_j = 2**(score_j - maximum) * v_scale_j

Queries are quantized to 8 bits, each head by itself; the weights w to 15 bits, each block of 64 keys by itself. Such
weights cost as much as bfloat16 weights, and an error of 8 bits would show where one key outweighs the others of its
block.

Error: for standard normal q, k and v 0.5 % of the float64 result (rms), and 1 % counted from the numbers before they
  were cached (bfloat16: 0.3 %).
Source: the scales of blocks as in SageAttention, Zhang et al. 2024.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.numbers import int64
from lockstep.native.simd import fma, maximum, rint, to_f32, to_i32
from lockstep.ops.attention.attention import as_it_is, attend_all, attention_of, first_seen
from lockstep.ops.attention.formulas import ZERO
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.attention.kv_cache_q8 import head_place, read_key, read_value
from lockstep.ops.elementwise.activations import HIGHEST, INFINITY, ONE_127TH, SMALLEST, magnitude
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import entry, pages_of

MAX_CODE, ONE_CODE = np.float32(32767), np.float32(1 / 32767)  # a weight's code is an int16


class Quantized(NamedTuple):
    """int8 codes with float32 scales: those of a query [K] with one scale, those of keys or values [C, K] with [C]."""

    codes: np.ndarray
    scale: np.ndarray | np.float32


@definition
def quantized_query(q_K):
    """Quantizes a query, which is multiplied by the attention's scale already.

    Error: half a code, amax / 254.
    Order: amax exactly; the scale is amax * (1 / 127), a code rint(q * (127 / amax)), ties to even. With amax < 1e-30
      scale and codes are zero; with a NaN or an infinity the codes are zero and the scale is infinite.
    """
    amax, codes_K = ZERO, np.zeros(q_K.size, np.int8)
    for d in range(q_K.size):
        amax = maximum(magnitude(q_K[d]), amax)
    if amax == INFINITY:
        return Quantized(codes_K, INFINITY)
    if amax < SMALLEST:
        return Quantized(codes_K, ZERO)
    inverse = HIGHEST / amax
    for d in range(q_K.size):
        codes_K[d] = np.int8(to_i32(rint(q_K[d] * inverse)))
    return Quantized(codes_K, amax * ONE_127TH)


@definition
def score(q, k, j):
    """Order: the exact dot * (q_scale * k_scale)."""
    dot = int64(0)
    for d in range(q.codes.size):
        dot += int64(q.codes[d]) * int64(k.codes[j, d])
    return np.float32(dot) * (q.scale * k.scale[j])


@definition
def add_values(weight, v, low, high, out_K):
    """out += sum of w[j] code[j] over the seen keys of a block, with w[j] = weight[j - low] * scale[j] quantized.

    Error: 2**-16 of the largest w.
    Order: the largest w exactly; scale = w * (1 / 32767); a code is rint(w[j] * (32767 / w)), ties to even, or 0 if
      w < 1e-30; out = fma(float(exact dot, to nearest even), scale, out).
    """
    largest, weight_J = ZERO, np.empty(high - low, np.float32)
    for j in range(low, high):
        weight_J[j - low] = weight[j - low] * v.scale[j]
        largest = maximum(weight_J[j - low], largest)
    if largest < SMALLEST:
        return
    inverse, scale, codes = MAX_CODE / largest, largest * ONE_CODE, np.empty(weight_J.size, np.int64)
    for j in range(weight_J.size):
        codes[j] = to_i32(rint(weight_J[j] * inverse))
    for d in range(out_K.size):
        dot = int64(0)
        for j in range(low, high):
            dot += codes[j - low] * int64(v.codes[j, d])
        out_K[d] = fma(to_f32(np.int32(dot)), scale, out_K[d])


attend_quantized = attention_of(
    "attend_quantized", QUERY=quantized_query, SCORE=score, WEIGHT=as_it_is, ADD_VALUES=add_values
)


@inlined
def gather_quantized(a, batch, request, g):
    """Keys and values of one kv head of a request, gathered from its pages: k, v Quantized [C, K]. See
    `attention.gather`."""
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
        attend_all(op, step, gather_quantized, attend_quantized)


REFERENCE = {"attention_q8": Implementation(_run)}
