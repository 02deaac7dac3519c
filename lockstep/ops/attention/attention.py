"""Causal attention of queries over the keys and values of their sequence: the definition.

    out[h] = v_scale * sum_j softmax_j(scale * q[h] . k[j]) v[j]      position - window < j <= position

where query head h reads the keys and values of kv head h // (H / G), and a sink, if there is one, joins the softmax as
one more score without a value.

The arithmetic depends only on the query's own position and keys: never on its batch, chunk or page placement.
"""

from types import FunctionType

import numpy as np

from lockstep.formats.bf16 import dot_bf16, flushed_fma
from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, maximum, round_bf16
from lockstep.ops.attention.formulas import (
    BLOCK,
    MAX_GROUP,
    MAX_HEAD_DIM,
    ONE,
    SPAN,
    ZERO,
    cleared,
    exp2,
    first_key,
    kept_share,
    score_scales,
    soft_capped,
)
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, check_pages, k_index, kv_dtype_of, read_number, v_index
from lockstep.ops.math import sigmoid, tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, constant, output, rows
from lockstep.runtime.program import CacheArray, Tensor, Weight
from lockstep.runtime.step import StepBlock, entry, pages_of


class Attention(Operands):
    """out[h] = softmax(scale * q[h] . k) v over the keys that a token sees, times sigmoid(gate[h]) if there is a gate.

    window: how many keys a token sees at most; 0: all up to its own. soft_cap: scores become soft_cap * tanh(score /
    soft_cap); 0: they stay. sinks: one score for each query head, in units of e, that joins its softmax without a
    value. v_scale: a factor of all values; a factor of all keys belongs into scale. stats receives the maximum and the
    sum of each softmax, without its sink, [num_heads, 2] a row. Head h of the gate begins at column gate_offset + h *
    gate_stride. page_group: the cache group of the pages.
    """

    group = "attention"
    rules = (
        "num_heads % num_kv_heads == 0",
        f"num_heads <= {MAX_GROUP} * num_kv_heads",
        "head_dim % 16 == 0",
        f"head_dim <= {MAX_HEAD_DIM}",
        "soft_cap >= 0",
    )
    out: Tensor = output("num_heads * head_dim")
    stats: Tensor = output("2 * num_heads", scratch=True)
    q: Tensor = rows("num_heads * head_dim")
    k_pages: CacheArray = cache(kind="pages")
    v_pages: CacheArray = cache(kind="pages")
    gate: Tensor | None = rows("gate_width", optional=True)
    sinks: Weight | None = constant("num_heads", optional=True)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    soft_cap: float
    gate_width: int = 0
    gate_offset: int = 0
    gate_stride: int = 0
    v_scale: float = 1.0
    page_group: int = 0

    def check(self):
        check_pages(self)
        max_window = self.k_pages.window
        if max_window and not 0 < self.window <= max_window:
            raise ValueError(
                f"Attention: window is {self.window}, but {self.k_pages.name} is kept for {max_window} tokens"
            )
        end = self.gate_offset + (self.num_heads - 1) * self.gate_stride + self.head_dim
        if self.gate is not None and end > self.gate_width:
            raise ValueError(f"Attention: the gate ends at column {end} of rows of {self.gate_width}")

    @property
    def kv_dtype(self):
        """The type of the cache, one of KV_DTYPES."""
        return kv_dtype_of(self.k_pages)

    @property
    def kind(self):
        return "attention" if self.kv_dtype == "f32" else f"attention_{self.kv_dtype}"

    def flops(self, context):
        return self.num_heads * (4 * self.head_dim + 4) * min(context, self.window or context)


@definition
def as_it_is(x):
    return x


@definition
def float_score(q_K, k_CK, j):
    """Order: a chain of fma over d ascending from +0."""
    score = ZERO
    for d in range(q_K.size):
        score = fma(q_K[d], k_CK[j, d], score)
    return score


@definition
def add_float_values(weight, v_CK, low, high, out_K):
    """Order: out = fma(p, v, out), key by key in ascending order."""
    for j in range(low, high):
        for d in range(out_K.size):
            out_K[d] = fma(weight[j - low], v_CK[j, d], out_K[d])


@definition
def rounded_query(q_K):
    """Each number as a bfloat16."""
    for d in range(q_K.size):
        q_K[d] = round_bf16(q_K[d])
    return q_K


@definition
def pair_score(q_K, k_CK, j):
    """Order: that of `bf16.dot_bf16`."""
    return dot_bf16(q_K, k_CK[j])


@definition
def rounded_weight(p):
    return round_bf16(p)


@definition
def add_pairs_of_values(weight, v_CK, low, high, out_K):
    """Order: pairs of an even key and the odd key after it, the odd one first, each step flushed: with f =
    `bf16.flushed_fma`, out = f(p0, v0, f(p1, v1, out)); a key of a pair outside low .. high - 1 counts as 0 times 0."""
    for j in range(low - low % 2, high, 2):
        for d in range(out_K.size):
            p0, v0 = (weight[j - low], v_CK[j, d]) if j >= low else (ZERO, ZERO)
            p1, v1 = (weight[j + 1 - low], v_CK[j + 1, d]) if j + 1 < high else (ZERO, ZERO)
            out_K[d] = flushed_fma(p0, v0, flushed_fma(p1, v1, out_K[d]))


# How keys and values of a type are multiplied: constants of each variant of `attend_head` and `attend_span`.
# QUERY(q [K], scaled): the query in the form that SCORE takes; SCORE(query, keys, j): the score of key j, in units of
# log 2; WEIGHT(p): a weight, rounded for its product; ADD_VALUES(weight [64], values, low, high, out [K]): out += sum
# of weight[j - low] v[j], low <= j < high
QUERY, SCORE, WEIGHT, ADD_VALUES = as_it_is, float_score, as_it_is, add_float_values


def attend_span(q, keys, values, start, stop, cap, out_K):
    """Keys start .. stop - 1 of one span: out = sum of 2**(score - maximum) v, not yet divided; returns the maximum and
    the sum of 2**(score - maximum).

    Order: keys in blocks of 64 at absolute positions. In a block: the scores by SCORE, then the soft cap if any
      (cap > 0): cap * (1 - 2 / (1 + 2**score)), the score being limited to 64 from above; the new maximum of all keys
      so far; where the maximum grew, out and the 16 lanes of the sum are multiplied by 2**(old - new) and cleared; then
      the weights p = WEIGHT(2**(score - maximum)), key by key: lane j % 16 += p; then ADD_VALUES. At the end the lanes
      are added by `tree_sum`.
    """
    lane, score, top = np.empty(16, np.float32), np.empty(BLOCK, np.float32), ZERO
    for i in range(16):
        lane[i] = ZERO
    for d in range(out_K.size):
        out_K[d] = ZERO
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        for j in range(low, high):
            score[j - low] = SCORE(q, keys, j)
            if cap > ZERO:
                score[j - low] = soft_capped(score[j - low], cap)
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
            score[j - low] = WEIGHT(exp2(score[j - low] - top))
            lane[j % 16] = lane[j % 16] + score[j - low]
        ADD_VALUES(score, values, low, high, out_K)
    return top, tree_sum(lane)


ATTEND_SPAN = attend_span  # a constant of each variant of `attend_head`: the same variant of `attend_span`


@definition
def merge(top, total, out_K, span_top, span_total, span_K, is_first):
    """Merges the result of a span into that of earlier spans, in out (see `attend_head`); returns the new maximum and
    sum."""
    if is_first:
        for d in range(out_K.size):
            out_K[d] = span_K[d]
        return span_top, span_total
    higher = maximum(span_top, top)
    old, new = exp2(top - higher), exp2(span_top - higher)
    for d in range(out_K.size):
        out_K[d] = cleared(fma(out_K[d], old, cleared(span_K[d] * new)))
    return higher, fma(total, old, span_total * new)


def attend_head(q_K, keys, values, position, window, scales, out_K):
    """One query head at one position over a sequence's keys and values; returns the maximum and the sum of its softmax.

    Shapes: q, out [K] float32; keys and values of C > position tokens: [C, K] float32 (for `attend_pairs` with bfloat16
      numbers), or what SCORE and ADD_VALUES of the variant read. window 0: all keys up to position, else the last
      `window` of them.
    Units: scales from `score_scales`; the maximum is a score in units of log 2, sum = sum of 2**(score - maximum).
    Error: 2e-6 of the float64 result for scores below 20 and |v| < 4, up to 2048 keys; for bfloat16 pairs 2**-9 of a
      score and of each weight, as in every attention that multiplies bfloat16.
    Order: q * scale, cleared, then QUERY. Keys in spans of 1024 at absolute positions 0, 1024, ...:
      ATTEND_SPAN each, merged in ascending order: with M the larger maximum, old = 2**(m1 - M), new = 2**(m2 - M):
      sum = fma(sum1, old, sum2 * new), out = fma(out1, old, out2 * new). Last, out / sum. out2 * new and all numbers
      that go to out are `cleared`.
    Source: online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022.
    """
    first, (scale, cap) = first_key(position, window), scales
    top, total, span_K, scaled_K = ZERO, ZERO, np.empty(out_K.size, np.float32), np.empty(out_K.size, np.float32)
    for d in range(q_K.size):
        scaled_K[d] = cleared(q_K[d] * scale)
    q = QUERY(scaled_K)
    for span in range(first // SPAN, position // SPAN + 1):
        start, stop = max(first, span * SPAN), min(position + 1, (span + 1) * SPAN)
        span_top, span_total = ATTEND_SPAN(q, keys, values, start, stop, cap, span_K)
        top, total = merge(top, total, out_K, span_top, span_total, span_K, span == first // SPAN)
    for d in range(out_K.size):
        out_K[d] = cleared(out_K[d] / total)
    return top, total


def definition_variant(body, name, **constants):
    """The definition made from `body`, a plain function, with some of its global names bound to constants; it is cached
    under the given name."""
    code = body.__code__.replace(co_name=name, co_qualname=name)
    return definition(FunctionType(code, {**body.__globals__, **constants}, name))


def attention_of(name, **constants):
    """The variant of `attend_head` for a type of keys and values. constants: QUERY, SCORE, WEIGHT and ADD_VALUES."""
    span = definition_variant(attend_span, f"{name}_span", **constants)
    return definition_variant(attend_head, name, **constants, ATTEND_SPAN=span)


attend = attention_of("attend", QUERY=as_it_is, SCORE=float_score, WEIGHT=as_it_is, ADD_VALUES=add_float_values)
attend_pairs = attention_of(
    "attend_pairs", QUERY=rounded_query, SCORE=pair_score, WEIGHT=rounded_weight, ADD_VALUES=add_pairs_of_values
)


@definition
def finished(out_K, top, total, sinks_1, v_scale):
    """Applies the sink and v_scale to a head's result, in place, after `attend`.

    Shapes: sinks [1], or [0] for none.
    Order: with a sink out * `kept_share`, cleared; then out * v_scale, cleared.
    """
    for i in range(sinks_1.size):
        share = kept_share(top, total, sinks_1[i])
        for d in range(out_K.size):
            out_K[d] = cleared(out_K[d] * share)
    for d in range(out_K.size):
        out_K[d] = cleared(out_K[d] * v_scale)


@definition
def gated(out_K, gate_K):
    """out *= sigmoid(gate), the gate of gated attention."""
    for d in range(out_K.size):
        out_K[d] = cleared(out_K[d] * sigmoid(gate_K[d]))


@inlined
def first_seen(a, batch, request):
    """The first position of a request that any of its tokens of the step sees."""
    num_tokens = entry(batch.query_start, request + 1) - entry(batch.query_start, request)
    return first_key(entry(batch.context_len, request) - num_tokens, a.window)


@inlined
def gather(a, batch, request, g, bf16):
    """Keys and values of one kv head of a request, gathered from its pages: k, v [C, K], C tokens of context. What no
    token of the step sees is left undefined."""
    G, K, length = a.num_kv_heads, a.head_dim, entry(batch.context_len, request)
    k_CK, v_CK = np.empty((length, K), np.float32), np.empty((length, K), np.float32)
    table = pages_of(batch, request, a.page_group)
    for position in range(first_seen(a, batch, request), length):
        page, slot = entry(table, position // PAGE_TOKENS), position % PAGE_TOKENS
        for d in range(K):
            k_CK[position, d] = read_number(a.k_pages, k_index(page, g, d, slot, G, K, bf16), bf16)
            v_CK[position, d] = read_number(a.v_pages, v_index(page, g, d, slot, G, K, bf16), bf16)
    return k_CK, v_CK


@inlined
def gather_floats(a, batch, request, g):
    return gather(a, batch, request, g, False)


@inlined
def gather_pairs(a, batch, request, g):
    return gather(a, batch, request, g, True)


@inlined
def attend_all(op, step, gather_head, attend_one):
    """The op on all requests, head by head. gather_head: gathers keys and values, as `gather_floats`; attend_one: the
    attention over them, as `attend`."""
    a, batch = Attention.read(op), StepBlock.read(step)
    group = a.num_heads // a.num_kv_heads
    for s in range(batch.num_requests):
        start, stop, length = entry(batch.query_start, s), entry(batch.query_start, s + 1), entry(batch.context_len, s)
        for g in range(a.num_kv_heads):
            k, v = gather_head(a, batch, s, g)
            for t in range(start, stop):
                for h in range(g * group, (g + 1) * group):
                    _attend_head(a, t, h, length - (stop - t), k, v, attend_one)


@inlined
def _attend_head(a, t, h, position, k, v, attend_one):
    """One query head of token t."""
    K, at = a.head_dim, a.num_heads * t + h
    q_K, out_K = carray(float_array(a.q + 4 * K * at), (K,)), carray(float_array(a.out + 4 * K * at), (K,))
    stats_2, scales = carray(float_array(a.stats + 8 * at), (2,)), score_scales(a.scale, a.soft_cap)
    top, total = attend_one(q_K, k, v, position, a.window, scales, out_K)
    stats_2[0], stats_2[1] = top, total
    finished(out_K, top, total, carray(float_array(a.sinks + 4 * h), (1 if a.sinks != 0 else 0,)), a.v_scale)
    if a.gate != 0:
        gate = a.gate + 4 * (a.gate_width * t + a.gate_offset + a.gate_stride * h)
        gated(out_K, carray(float_array(gate), (K,)))


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        attend_all(op, step, gather_floats, attend)


@kernel
def _run_pairs(op, step, thread, num_threads):
    if thread == 0:
        attend_all(op, step, gather_pairs, attend_pairs)


REFERENCE = {"attention": Implementation(_run), "attention_bf16": Implementation(_run_pairs)}
