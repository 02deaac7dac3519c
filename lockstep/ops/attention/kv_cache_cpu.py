"""What enters attention: the fast kernel. One pass over a token's row: norm, rotation, and K and V into their page.

Bound by the read of the projection, and by the scattered writes of K (one line of memory for each dimension or pair). A
thread takes sixteen tokens at a time, so that those lines are written whole by one core while they are in its cache.
"""

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import float32, int32
from lockstep.native.simd import bf16_bits, fma, load, peek, poke, round_bf16, store, store_bf16
from lockstep.native.tiles import store_pairs
from lockstep.ops.attention.formulas import MAX_HEAD_DIM
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, AttentionInputs, k_index, v_index
from lockstep.ops.elementwise.rms_norm_cpu import norm_row
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, num_rows, pages_of

ONE, ZERO = np.float32(1), np.float32(0)
TOKENS_AT_ONCE = 16
MAX_HEAD_BYTES = 4 * MAX_HEAD_DIM


@inlined
def prepare_head(a, x, norm, cos, sin, out):
    """One head of float32 at x, normed (not if norm is 0) and rotated, to out."""
    K, R = a.head_dim, a.rope_dim // 2
    if norm != 0:
        norm_row(x, norm, K, a.eps, a.norm_offset, out)
    else:
        for i in range(0, 4 * K, 64):
            store(out + i, load(x + i))
    whole = R - R % 16
    for i in range(0, 4 * whole, 64):
        low, high, c, s = load(out + i), load(out + 4 * R + i), load(cos + i), load(sin + i)
        store(out + i, fma(low, c, high * -s))
        store(out + 4 * R + i, fma(high, c, low * s))
    for i in range(4 * whole, 4 * R, 4):
        low, high = peek(out + i, float32), peek(out + 4 * R + i, float32)
        c, s = peek(cos + i, float32), peek(sin + i, float32)
        poke(out + i, fma(low, c, high * -s))
        poke(out + 4 * R + i, fma(high, c, low * s))


@inlined
def keep_key(a, k, page, slot, g):
    """Scatters a key over its page, one dimension (or pair) every 64 of them."""
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
def keep_value(v, v_pages, at, K, bf16):
    """Copies a value to index at of its page; in pairs every other number there is a neighbour's."""
    if bf16:
        for d in range(K):
            poke(v_pages + 2 * (at + 2 * d), bf16_bits(round_bf16(peek(v + 4 * d, float32))))
    else:
        for d in range(0, K, 16):
            store(v_pages + 4 * (at + d), load(v + 4 * d))


@inlined
def keep_two_values(v, row, v_pages, at, K):
    """Copies an even position's value and the next one, `row` bytes on, to index at of their page of pairs."""
    for d in range(0, K, 16):
        store_pairs(v_pages + 2 * (at + 2 * d), round_bf16(load(v + 4 * d)), round_bf16(load(v + row + 4 * d)))


@inlined
def slot_of(a, batch, t):
    """(request, page, slot) of a token, by the page table of an op's group."""
    position, request = entry(batch.position, t), entry(batch.request, t)
    return request, entry(pages_of(batch, request, a.page_group), position // PAGE_TOKENS), position % PAGE_TOKENS


@inlined
def prepare_token(a, batch, t, g, keep, memory):
    """One kv head's key of a token, and the query heads that read it. memory: scratch for a head."""
    H, K, group = a.num_heads, a.head_dim, a.num_heads // a.num_kv_heads
    x, place = a.x + 4 * a.row_width * t, 4 * (a.rope_dim // 2) * entry(batch.position, t)
    cos, sin = a.cos + place, a.sin + place
    for h in range(g * group, (g + 1) * group):
        prepare_head(a, x + 4 * (a.q_offset + h * a.q_stride), a.q_norm, cos, sin, a.q + 4 * K * (t * H + h))
    prepare_head(a, x + 4 * (a.k_offset + g * K), a.k_norm, cos, sin, memory)
    _, page, slot = slot_of(a, batch, t)
    keep(a, memory, page, slot, g)


@inlined
def keep_values(a, batch, first, last, g, memory):
    """One kv head's values of tokens first .. last: by two where they share a row of pairs."""
    K, row, t = a.head_dim, 4 * a.row_width, first
    while t < last:
        request, page, slot = slot_of(a, batch, t)
        v, at = a.x + row * t + 4 * (a.v_offset + g * K), v_index(page, g, 0, slot, a.num_kv_heads, K, a.bf16)
        if a.bf16 and slot % 2 == 0 and t + 1 < last and entry(batch.request, t + 1) == request:
            keep_two_values(v, row, a.v_pages, at, K)
            t += 1
        else:
            keep_value(v, a.v_pages, at, K, a.bf16)
        t += 1


@inlined
def prepare(op, step, thread, num_threads, keep, keep_all):
    """The thread's share: runs of tokens, whole rows of the projection; few runs are cut by kv heads.

    The runs of a thread are neighbours: where one ends inside a line of K, two threads would take turns with the line.
    keep, keep_all: write a key, and a run's values, to pages of one type (as `keep_key` and `keep_values`).
    """
    a, batch, T = AttentionInputs.read(op), StepBlock.read(step), num_rows(op, step)
    memory = stack_memory(MAX_HEAD_BYTES)
    runs = (T + TOKENS_AT_ONCE - 1) // TOKENS_AT_ONCE
    heads = a.num_kv_heads if runs >= 4 * num_threads else 1
    parts = a.num_kv_heads // heads
    for item in range(runs * parts * thread // num_threads, runs * parts * (thread + 1) // num_threads):
        first, g0 = item // parts * TOKENS_AT_ONCE, item % parts * heads
        last = min(T, first + TOKENS_AT_ONCE)
        for t in range(first, last):
            for g in range(g0, g0 + heads):
                prepare_token(a, batch, t, g, keep, memory)
        for g in range(g0, g0 + heads):
            keep_all(a, batch, first, last, g, memory)


@kernel
def attention_inputs(op, step, thread, num_threads):
    """float32 or bfloat16 pages."""
    prepare(op, step, thread, num_threads, keep_key, keep_values)


CPU = {"attention_inputs": Implementation(attention_inputs)}
