"""The op that prepares attention's inputs: the fast kernel. One pass over a token's row: norm, rotation, K and V to
their page.

Bound by the read of the projection, and by the scattered writes of K (one cache line for each dimension or pair). A
thread takes sixteen tokens at a time, and of these one head's keys after another's: lines of one head, which are far
apart and share few sets of the first-level cache, stay there until all sixteen have been written.
"""

from lockstep.native.kernel import inlined, kernel, variant
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import float32, int32
from lockstep.native.simd import bf16_bits, fma, load, peek, poke, round_bf16, store, store_bf16
from lockstep.native.tiles_pairs import store_pairs
from lockstep.ops.attention.formulas import MAX_HEAD_DIM
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, AttentionInputs, AttentionQueries, k_index, v_index
from lockstep.ops.elementwise.rms_norm_cpu import inverse_rms, norm_row, scaled_row
from lockstep.ops.math import ZERO
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, num_rows, pages_of

TOKENS_AT_ONCE = 16
MAX_HEAD_BYTES = 4 * MAX_HEAD_DIM
SCRATCH_BYTES = 5 * MAX_HEAD_BYTES
ONE_THREAD = None  # constant of a variant: whether one thread prepares all rows


@inlined
def prepare_head(a, x, norm, cos, sin, out):
    """Writes one head of float32 at x, normed (not if norm is 0) and rotated, to out."""
    K = a.head_dim
    if norm != 0:
        norm_row(x, norm, K, a.eps, a.norm_offset, out)
    else:
        for i in range(0, 4 * K, 64):
            store(out + i, load(x + i))
    rotate_head(a, cos, sin, out)


@inlined
def rotate_head(a, cos, sin, out):
    """Rotates the head at out."""
    R = a.rope_dim // 2
    whole = R - R % 16
    for i in range(0, 4 * whole, 64):
        low, high, cosine, sine = load(out + i), load(out + 4 * R + i), load(cos + i), load(sin + i)
        store(out + i, fma(low, cosine, high * -sine))
        store(out + 4 * R + i, fma(high, cosine, low * sine))
    for i in range(4 * whole, 4 * R, 4):
        low, high = peek(out + i, float32), peek(out + 4 * R + i, float32)
        cosine, sine = peek(cos + i, float32), peek(sin + i, float32)
        poke(out + i, fma(low, cosine, high * -sine))
        poke(out + 4 * R + i, fma(high, cosine, low * sine))


@inlined
def prepare_part(a, x, norm, scale, head, cos, sin, out):
    """`prepare_head`, for the head of a number in a row at x. scale: of the whole row, where all heads are normed
    together; norm: then of all heads."""
    K = a.head_dim
    if a.whole_norms:
        scaled_row(x, scale, norm + 4 * K * head, K, a.norm_offset, out)
        rotate_head(a, cos, sin, out)
    else:
        prepare_head(a, x, norm, cos, sin, out)


@inlined
def whole_scale(a, x, num_heads):
    """1 / rms of all heads at x, if they are normed together."""
    return inverse_rms(x, num_heads * a.head_dim, a.eps) if a.whole_norms else ZERO


@inlined
def write_key(a, k, page, slot, g):
    """Scatters a key over its page: a dimension (or pair of dimensions) in each row."""
    K, at = a.head_dim, k_index(page, g, 0, slot, a.num_kv_heads, a.head_dim, a.bf16)
    if a.bf16:
        for d in range(0, K, 16):
            store_bf16(k + 2 * d, round_bf16(load(k + 4 * d)))
        for i in range(K // 2):
            poke(a.k_pages + 2 * at + 4 * PAGE_TOKENS * i, peek(k + 4 * i, int32))
    else:
        for d in range(K):
            poke(a.k_pages + 4 * (at + PAGE_TOKENS * d), peek(k + 4 * d, float32))


@inlined
def write_value(v, v_pages, index, K, bf16):
    """Copies a value to an index of V pages; in bfloat16 it is interleaved with the value of a neighbouring slot."""
    if bf16:
        for d in range(K):
            poke(v_pages + 2 * (index + 2 * d), bf16_bits(round_bf16(peek(v + 4 * d, float32))))
    else:
        for d in range(0, K, 16):
            store(v_pages + 4 * (index + d), load(v + 4 * d))


@inlined
def write_two_values(v, row_bytes, v_pages, index, K):
    """Copies an even position's value and the next one, row_bytes further on, to an index of bfloat16 V pages."""
    for d in range(0, K, 16):
        low, high = load(v + 4 * d), load(v + row_bytes + 4 * d)
        store_pairs(v_pages + 2 * (index + 2 * d), round_bf16(low), round_bf16(high))


@inlined
def slot_of(a, batch, t):
    """(request, page, slot) of a token, by the page table of the op's page group."""
    position, request = entry(batch.position, t), entry(batch.request, t)
    return request, entry(pages_of(batch, request, a.page_group), position // PAGE_TOKENS), position % PAGE_TOKENS


@inlined
def prepare_queries(a, batch, t, g):
    """Prepares a token's query heads that share a kv head.

    The root mean square of all heads is computed for each of them again: of few tokens, threads share the heads.
    """
    H, K, group = a.num_heads, a.head_dim, a.num_heads // a.num_kv_heads
    q, table_row = a.x + 4 * (a.row_width * t + a.q_offset), 4 * (a.rope_dim // 2) * entry(batch.position, t)
    cos = table_row + (a.q_cos if a.q_cos != 0 else a.cos)
    sin = table_row + (a.q_sin if a.q_sin != 0 else a.sin)
    scale = whole_scale(a, q, H)
    for h in range(g * group, (g + 1) * group):
        prepare_part(a, q + 4 * h * a.q_stride, a.q_norm, scale, h, cos, sin, a.q + 4 * K * (t * H + h))


@inlined
def prepare_key(a, batch, t, g, write_key, memory):
    """Prepares a token's key of one kv head. memory: scratch for a head."""
    k, table_row = a.x + 4 * (a.row_width * t + a.k_offset), 4 * (a.rope_dim // 2) * entry(batch.position, t)
    scale = whole_scale(a, k, a.num_kv_heads)
    prepare_part(a, k + 4 * g * a.head_dim, a.k_norm, scale, g, a.cos + table_row, a.sin + table_row, memory)
    _, page, slot = slot_of(a, batch, t)
    write_key(a, memory, page, slot, g)


@inlined
def values_of(a, t, num_tokens, g, memory):
    """Where the values of one kv head of num_tokens tokens from t on lie, at most four, and how many bytes apart: in
    the projection, or, normed, in `memory`."""
    K, row_bytes = a.head_dim, 4 * a.row_width
    v = a.x + row_bytes * t + 4 * (a.v_offset + g * K)
    if a.norms_values:
        for n in range(num_tokens):
            scale = inverse_rms(v + row_bytes * n, K, a.eps)
            for i in range(0, 4 * K, 64):
                store(memory + 4 * K * n + i, load(v + row_bytes * n + i) * scale)
        return memory, 4 * K
    return v, row_bytes


@inlined
def write_values(a, batch, first, end, g, memory):
    """Writes one kv head's values of tokens first .. end - 1: two at a time where they share a row of pairs. memory:
    scratch for four heads."""
    K, t = a.head_dim, first
    while t < end:
        request, page, slot = slot_of(a, batch, t)
        index = v_index(page, g, 0, slot, a.num_kv_heads, K, a.bf16)
        if a.bf16 and slot % 2 == 0 and t + 1 < end and entry(batch.request, t + 1) == request:
            v, row_bytes = values_of(a, t, 2, g, memory)
            write_two_values(v, row_bytes, a.v_pages, index, K)
            t += 1
        else:
            v, row_bytes = values_of(a, t, 1, g, memory)
            write_value(v, a.v_pages, index, K, a.bf16)
        t += 1


@inlined
def prepare(op, step, thread, num_threads, write_key, write_values):
    """The thread's share: runs of tokens, whole rows of the projection; where there are few runs, they are cut by kv
    heads.

    A thread's runs are neighbours: a run and the next one may write to the same cache line of K, for which two threads
    would have to take turns. write_key, write_values: write a key, and the values of a run, to pages of one type.
    """
    a, batch, T = AttentionInputs.read(op), StepBlock.read(step), num_rows(op, step)
    memory = stack_memory(SCRATCH_BYTES)
    num_runs = (T + TOKENS_AT_ONCE - 1) // TOKENS_AT_ONCE
    heads = a.num_kv_heads if num_runs >= 4 * num_threads else 1
    parts = a.num_kv_heads // heads
    for item in range(num_runs * parts * thread // num_threads, num_runs * parts * (thread + 1) // num_threads):
        first, first_head = item // parts * TOKENS_AT_ONCE, item % parts * heads
        end = min(T, first + TOKENS_AT_ONCE)
        for t in range(first, end):
            for g in range(first_head, first_head + heads):
                prepare_queries(a, batch, t, g)
        for g in range(first_head, first_head + heads):
            for t in range(first, end):
                prepare_key(a, batch, t, g, write_key, memory)
        for g in range(first_head, first_head + heads):
            write_values(a, batch, first, end, g, memory)


@kernel
def attention_inputs(op, step, thread, num_threads):
    """For float32 or bfloat16 pages."""
    prepare(op, step, thread, num_threads, write_key, write_values)


def prepare_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a, batch = AttentionQueries.read(op), StepBlock.read(step)
    H, K = a.num_heads, a.head_dim
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, table_row = a.x + 4 * a.row_width * t, 4 * (a.rope_dim // 2) * entry(batch.position, t)
        for h in range(H):
            prepare_head(a, x + 4 * K * h, a.q_norm, a.cos + table_row, a.sin + table_row, a.q + 4 * K * (t * H + h))


attention_queries = variant(prepare_rows, "attention_queries", ONE_THREAD=False)
attention_queries_per_token = variant(prepare_rows, "attention_queries_per_token", ONE_THREAD=True)

CPU = {"attention_inputs": Implementation(attention_inputs), "attention_queries": Implementation(attention_queries)}
PER_TOKEN = {"attention_queries": Implementation(attention_queries_per_token)}
