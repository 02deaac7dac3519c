"""What enters attention: the fast kernel. One pass over a token's row: norm, rotation, and K and V into their page.

Bound by the scattered writes of K (one line of memory for each dimension). A thread takes one kv head, with its query
heads, of sixteen tokens in turn, so that those lines are written whole by one core while they are in its cache.
"""
import numpy as np
from numba import float32, int32

from lockstep.ops.kv_cache import PAGE_TOKENS, k_index, v_index
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import stack_memory
from lockstep.runtime.simd import (bf16_bits, fma, lanes, load, peek, poke, round_bf16, sqrt, store, store_bf16,
                                   sum_lanes)
from lockstep.runtime.step import PAGE_TABLE, PAGES_PER_REQUEST, POSITION, REQUEST, num_rows, number, step_word, word

ONE, ZERO = np.float32(1), np.float32(0)
TOKENS_AT_ONCE = 16
MAX_HEAD_BYTES = 1024


@inlined
def prepare_head(x, K, norm, eps, norm_offset, cos, sin, R, out):
    """One head of K float32 at x, normed (not if norm is 0) and rotated, to out."""
    scale = ONE
    if norm != 0:
        total = lanes(ZERO)
        for i in range(0, 4 * K, 64):
            total = fma(load(x + i), load(x + i), total)
        scale = ONE / sqrt(sum_lanes(total) / np.float32(K) + eps)
    for i in range(0, 4 * K, 64):
        store(out + i, (load(x + i) * scale) * (load(norm + i) + norm_offset) if norm != 0 else load(x + i))
    whole = R - R % 16
    for i in range(0, 4 * whole, 64):
        low, high, c, s = load(out + i), load(out + 4 * R + i), load(cos + i), load(sin + i)
        store(out + i, fma(low, c, high * -s))
        store(out + 4 * R + i, fma(high, c, low * s))
    for i in range(4 * whole, 4 * R, 4):
        low, high, c, s = peek(out + i, float32), peek(out + 4 * R + i, float32), peek(cos + i, float32), peek(sin + i, float32)
        poke(out + i, fma(low, c, high * -s))
        poke(out + 4 * R + i, fma(high, c, low * s))


@inlined
def keep_key(k, k_pages, at, K, bf16):
    """Scatters a key over its page, from index at, one dimension every 64 numbers."""
    if bf16:
        for d in range(K):
            poke(k_pages + 2 * (at + PAGE_TOKENS * d), bf16_bits(round_bf16(peek(k + 4 * d, float32))))
    else:
        for d in range(K):
            poke(k_pages + 4 * (at + PAGE_TOKENS * d), peek(k + 4 * d, float32))


@inlined
def keep_value(v, v_pages, at, K, bf16):
    """Copies a value to index at of its page."""
    for d in range(0, K, 16):
        if bf16:
            store_bf16(v_pages + 2 * (at + d), round_bf16(load(v + 4 * d)))
        else:
            store(v_pages + 4 * (at + d), load(v + 4 * d))


@inlined
def prepare_token(op, step, base, q_norm, k_norm, t, g, memory):
    """One kv head of a token, with the query heads that read it."""
    H, G, K, R, row = word(op, base), word(op, base + 1), word(op, base + 2), word(op, base + 3) // 2, word(op, base + 4)
    bf16, eps, norm_offset = word(op, base + 9), number(op, base + 10), number(op, base + 11)
    x, position = word(op, 1) + 4 * row * t, np.int64(peek(step_word(step, POSITION) + 4 * t, int32))
    cos, sin = word(op, 2) + 4 * R * position, word(op, 3) + 4 * R * position
    for h in range(g * (H // G), (g + 1) * (H // G)):
        prepare_head(x + 4 * (word(op, base + 5) + h * word(op, base + 6)), K, q_norm, eps, norm_offset, cos, sin, R,
                     word(op, 0) + 4 * K * (t * H + h))
    prepare_head(x + 4 * (word(op, base + 7) + g * K), K, k_norm, eps, norm_offset, cos, sin, R, memory)
    request = np.int64(peek(step_word(step, REQUEST) + 4 * t, int32))
    entry = request * step_word(step, PAGES_PER_REQUEST) + position // PAGE_TOKENS
    page, slot = np.int64(peek(step_word(step, PAGE_TABLE) + 4 * entry, int32)), position % PAGE_TOKENS
    keep_key(memory, word(op, 4), k_index(page, g, 0, slot, G, K), K, bf16)
    keep_value(x + 4 * (word(op, base + 8) + g * K), word(op, 5), v_index(page, g, 0, slot, G, K), K, bf16)


@inlined
def prepare(op, step, thread, num_threads, base, q_norm, k_norm):
    """The thread's share: kv heads of runs of tokens, dealt in turn."""
    T, G, memory = num_rows(op, step), word(op, base + 1), stack_memory(MAX_HEAD_BYTES)
    for item in range(thread, (T + TOKENS_AT_ONCE - 1) // TOKENS_AT_ONCE * G, num_threads):
        first = item // G * TOKENS_AT_ONCE
        for t in range(first, min(T, first + TOKENS_AT_ONCE)):
            prepare_token(op, step, base, q_norm, k_norm, t, item % G, memory)


@kernel
def attention_inputs(op, step, thread, num_threads):
    """Rotation only."""
    prepare(op, step, thread, num_threads, 6, 0, 0)


@kernel
def normed_attention_inputs(op, step, thread, num_threads):
    """Norm of each query and key head, then rotation."""
    prepare(op, step, thread, num_threads, 8, word(op, 6), word(op, 7))


CPU = {"attention_inputs": Implementation(attention_inputs),
       "normed_attention_inputs": Implementation(normed_attention_inputs)}
