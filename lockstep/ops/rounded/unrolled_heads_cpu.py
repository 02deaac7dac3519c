"""Attention of one head in small steps: the fast kernels.

A thread has the same rows in every op, every num_threads-th, so that they stay in its caches. Products with keys or
values take HEIGHT of its rows of one request at a time, with sums in registers.
"""

from lockstep.native.kernel import inlined, kernel
from lockstep.native.numbers import float32
from lockstep.native.simd import peek, poke
from lockstep.ops.attention.kv_cache import PAGE_TOKENS, k_index, v_index
from lockstep.ops.attention.kv_cache_cpu import slot_of
from lockstep.ops.rounded.attention import row_keys
from lockstep.ops.rounded.attention_cpu import HEIGHT, score_rows, sequence_of, value_rows, value_tail
from lockstep.ops.rounded.row_math_cpu import add_mask_row, copy_row, scale_row, softmax_row
from lockstep.ops.rounded.unrolled_heads import (
    UNKNOWN,
    HeadScores,
    HeadValues,
    KeepHead,
    MaskRows,
    ScaleRows,
    SoftmaxRows,
    keys_in_row,
)
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, num_rows, pages_of


@kernel
def keep_head(op, step, thread, num_threads):
    """Each thread takes a run of tokens: neighbours share lines of K."""
    a, batch, T = KeepHead.read(op), StepBlock.read(step), num_rows(op, step)
    G, K = a.num_kv_heads, a.head_dim
    for t in range(T * thread // num_threads, T * (thread + 1) // num_threads):
        _, page, slot = slot_of(a, batch, t)
        key, k = a.k + 4 * K * t, a.k_pages + 4 * k_index(page, a.kv_head, 0, slot, G, K, False)
        for d in range(K):
            poke(k + 4 * PAGE_TOKENS * d, peek(key + 4 * d, float32))
        copy_row(a.v + 4 * K * t, K, a.v_pages + 4 * v_index(page, a.kv_head, 0, slot, G, K, False))


@inlined
def first_of(start, thread, num_threads):
    """The first row from `start` on that is the thread's."""
    return start + (thread - start) % num_threads


@inlined
def rows_until(first, end, num_threads):
    """The number of a thread's rows from its first one up to `end`."""
    return max(0, (end - first + num_threads - 1) // num_threads)


@inlined
def tile_at(i, num_rows):
    """(first row, height) of tile i of num_rows rows. The first, whose rows see the fewest keys, is the short one."""
    short = num_rows % HEIGHT
    if short == 0:
        return HEIGHT * i, HEIGHT
    return (0, short) if i == 0 else (short + HEIGHT * (i - 1), HEIGHT)


@kernel
def head_scores(op, step, thread, num_threads):
    """q . k of the thread's rows, a tile at a time."""
    a, batch = HeadScores.read(op), StepBlock.read(step)
    for request in range(batch.num_requests):
        first = first_of(entry(batch.query_start, request), thread, num_threads)
        num_own = rows_until(first, entry(batch.query_start, request + 1), num_threads)
        s = sequence_of((a.k_pages, 0), pages_of(batch, request, a.page_group), a.kv_head, a.num_kv_heads, a.head_dim)
        for i in range((num_own + HEIGHT - 1) // HEIGHT):
            skip, height = tile_at(i, num_own)
            t = first + num_threads * skip
            keys = keys_in_row(a, batch, t + num_threads * (height - 1))
            q, out = a.q + 4 * a.head_dim * t, a.out + 4 * a.width * t
            apart = 4 * num_threads * a.head_dim, 4 * num_threads * a.width
            score_rows(q, apart[0], height, s, keys, out, apart[1])
    for t in range(thread, num_rows(op, step), num_threads):
        if keys_in_row(a, batch, t) < row_keys(a, batch, t):
            poke(a.out + 4 * a.width * t, UNKNOWN)


@kernel
def scale_rows(op, step, thread, num_threads):
    """The thread's rows times a factor."""
    a, batch = ScaleRows.read(op), StepBlock.read(step)
    for t in range(thread, num_rows(op, step), num_threads):
        row = 4 * a.width * t
        scale_row(a.x + row, keys_in_row(a, batch, t), a.factor, a.out + row)


@kernel
def mask_rows(op, step, thread, num_threads):
    """The thread's rows plus the mask."""
    a, batch = MaskRows.read(op), StepBlock.read(step)
    for t in range(thread, num_rows(op, step), num_threads):
        row, keys = 4 * a.width * t, keys_in_row(a, batch, t)
        copy_row(a.x + row, keys, a.out + row)
        add_mask_row(a.out + row, keys, entry(batch.position, t), a.fill)


@kernel
def softmax_rows(op, step, thread, num_threads):
    """The softmax of the thread's rows."""
    a, batch = SoftmaxRows.read(op), StepBlock.read(step)
    for t in range(thread, num_rows(op, step), num_threads):
        row, keys = 4 * a.width * t, keys_in_row(a, batch, t)
        copy_row(a.x + row, keys, a.out + row)
        softmax_row(a.out + row, keys)


@kernel
def head_values(op, step, thread, num_threads):
    """p v of the thread's rows, a tile at a time."""
    a, batch = HeadValues.read(op), StepBlock.read(step)
    for request in range(batch.num_requests):
        first = first_of(entry(batch.query_start, request), thread, num_threads)
        num_own = rows_until(first, entry(batch.query_start, request + 1), num_threads)
        s = sequence_of((0, a.v_pages), pages_of(batch, request, a.page_group), a.kv_head, a.num_kv_heads, a.head_dim)
        for i in range((num_own + HEIGHT - 1) // HEIGHT):
            skip, height = tile_at(i, num_own)
            t = first + num_threads * skip
            shared = keys_in_row(a, batch, t)
            p, out = 4 * a.width, 4 * a.head_dim
            value_rows(a.p + p * t, p * num_threads, height, s, shared, a.out + out * t, out * num_threads)
            for row in range(t, t + num_threads * height, num_threads):
                value_tail(a.p + p * row, s, shared, keys_in_row(a, batch, row), a.out + out * row)


CPU = {
    "keep_head": Implementation(keep_head),
    "head_scores": Implementation(head_scores),
    "scale_rows": Implementation(scale_rows),
    "mask_rows": Implementation(mask_rows),
    "softmax_rows": Implementation(softmax_rows),
    "head_values": Implementation(head_values),
}
