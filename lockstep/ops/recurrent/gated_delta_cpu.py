"""Gated delta rule: the fast kernels.

Columns of the state never interact, so a task is a few blocks of 16 value columns of one head of one request, and
runs through that request's tokens in order. In prefill one pass over the state writes token t and reads token t + 1:

    load, fma (write), fma (output), mul (decay), store, fma (read)    per 16 columns and row of the state

so it is bound by 4 multiplications or FMAs per element, with the state in L1 (8 KiB a block at K = 128). Decode is
bound by reading and writing 4 * H * K * V bytes of state.

    state [slots, H, V / 16, K, 16]: a block of 16 columns is contiguous whatever the target; it is one AVX-512 register
    wide, and a target takes as many blocks at once as its registers hold: p, o and delta of each, plus k, q, k', decay.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.machine import fetch_add, prefetch
from lockstep.native.numbers import float32, int64
from lockstep.native.simd import fma, lanes, load, peek, poke, sqrt, store, sum_lanes
from lockstep.native.targets import TARGET
from lockstep.ops.math import ONE, ZERO, sigmoid
from lockstep.ops.recurrent.gated_delta import BLOCK, L2_EPS, DeltaGates, GatedDelta, L2Norm, decay_gate
from lockstep.ops.share import neighbouring
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, StepBlock, entry, num_rows


class Tokens(NamedTuple):
    """Addresses of a token's q, k, v, decay, beta and output."""

    q: int
    k: int
    v: int
    decay: int
    beta: int
    out: int


class Strides(NamedTuple):
    """Bytes from a token's qk, v, gates and output to the next token's."""

    qk: int
    v: int
    gates: int
    out: int


@kernel
def l2_norm(op, step, thread, num_threads):
    """Heads of all rows, in order, are cut into one run for each thread."""
    a = L2Norm.read(op)
    G, size = a.num_k_heads, 4 * a.k_head_dim
    root = ONE / sqrt(np.float32(a.k_head_dim))
    num_heads = num_rows(op, step) * 2 * G
    for i in range(num_heads * thread // num_threads, num_heads * (thread + 1) // num_threads):
        t, h = i // (2 * G), i % (2 * G)
        x = a.x + 4 * a.row_width * t + size * h
        normalise_head(x, size, root if h < G else ONE, a.out + size * i)


@inlined
def normalise_head(x, size, factor, out):
    """One head of `size` bytes at address x, made a unit vector times a factor; out may be x."""
    total = lanes(ZERO)
    for i in range(0, size, 64):
        v = load(x + i)
        total = fma(v, v, total)
    scale = ONE / sqrt(sum_lanes(total) + L2_EPS)
    for i in range(0, size, 64):
        store(out + i, (load(x + i) * scale) * factor)


@kernel
def delta_gates(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = DeltaGates.read(op)
    H = a.num_v_heads
    for t in range(thread, num_rows(op, step), num_threads):
        x = a.x + 4 * a.row_width * t
        gate_row(x + 4 * a.a_offset, x + 4 * a.b_offset, a.a_log, a.dt_bias, H, a.out + 8 * H * t)


@inlined
def gate_row(a, b, a_log, dt_bias, H, out):
    """Decay and beta of one token's H heads."""
    for i in range(0, H // 16 * 64, 64):
        store(out + i, decay_gate(load(a + i), load(dt_bias + i), load(a_log + i)))
        store(out + 4 * H + i, sigmoid(load(b + i)))
    for i in range(H // 16 * 64, 4 * H, 4):
        poke(out + i, decay_gate(peek(a + i, float32), peek(dt_bias + i, float32), peek(a_log + i, float32)))
        poke(out + 4 * H + i, sigmoid(peek(b + i, float32)))


# ---------------------------------------------------------------- two blocks of the state


@inlined
def load_pair(place, block):
    """A row of two blocks, `block` bytes apart."""
    return load(place), load(place + block)


@inlined
def store_pair(place, block, pair):
    store(place, pair[0])
    store(place + block, pair[1])


@inlined
def forget_read(row, block, k, decay, read):
    """One row of two blocks: decays it and adds its part of S^T k to read."""
    s0, s1 = load(row) * decay, load(row + block) * decay
    store(row, s0)
    store(row + block, s1)
    return fma(s0, k, read[0]), fma(s1, k, read[1])


@inlined
def write_out(row, block, k, q, delta, out):
    """One row of two blocks: adds k (x) delta to it, and its part of S^T q to out."""
    s0, s1 = fma(k, delta[0], load(row)), fma(k, delta[1], load(row + block))
    store(row, s0)
    store(row + block, s1)
    return fma(s0, q, out[0]), fma(s1, q, out[1])


@inlined
def written_read(s, k, q, delta, decay, k_next, out, read):
    """`write_out` of a row s in registers, then `forget_read` for the next token's k. Returns (out, read, s)."""
    s0, s1 = fma(k, delta[0], s[0]), fma(k, delta[1], s[1])
    out = fma(s0, q, out[0]), fma(s1, q, out[1])
    s0, s1 = s0 * decay, s1 * decay
    return out, (fma(s0, k_next, read[0]), fma(s1, k_next, read[1])), (s0, s1)


@inlined
def correction(v, column, beta, read):
    """delta = beta * (v - S^T k) of two blocks, whose values are `column` bytes apart; read: S^T k."""
    return (load(v) - read[0]) * beta, (load(v + column) - read[1]) * beta


@inlined
def zeros():
    return lanes(ZERO), lanes(ZERO)


@inlined
def run_two(state, block, K, tokens, stride, num_tokens, fresh, ahead):
    """Runs a request's tokens through two blocks of the state, `block` bytes apart (0: the same one twice).

    tokens: Tokens of the first. stride: Strides. fresh: whether the state starts as zeros. ahead: bytes from these
    blocks to those to prefetch, 0 for none. They are prefetched by the first and by the last pass through these blocks:
    processors drop prefetches while all that they can wait for is on its way.
    """
    q, k, v, decay, beta, out = tokens
    kept, read, column = peek(decay, float32), zeros(), min(block, 64)
    if fresh:
        for i in range(0, 64 * K, 64):
            store_pair(state + i, block, read)
    else:
        for i in range(K):
            prefetch(state + 64 * i + ahead)
            prefetch(state + 64 * i + ahead + block)
            read = forget_read(state + 64 * i, block, peek(k + 4 * i, float32), kept, read)
    for _ in range(num_tokens - 1):
        delta, sums, k_next = correction(v, column, peek(beta, float32), read), zeros(), k + stride.qk
        kept, decay, read = peek(decay + stride.gates, float32), decay + stride.gates, zeros()
        for i in range(K):
            row, key, query = state + 64 * i, peek(k + 4 * i, float32), peek(q + 4 * i, float32)
            key_next = peek(k_next + 4 * i, float32)
            sums, read, s = written_read(load_pair(row, block), key, query, delta, kept, key_next, sums, read)
            store_pair(row, block, s)
        store_pair(out, column, sums)
        q, k, v, beta, out = q + stride.qk, k_next, v + stride.v, beta + stride.gates, out + stride.out
    delta, sums = correction(v, column, peek(beta, float32), read), zeros()
    for i in range(K):
        prefetch(state + 64 * i + ahead)
        prefetch(state + 64 * i + ahead + block)
        sums = write_out(state + 64 * i, block, peek(k + 4 * i, float32), peek(q + 4 * i, float32), delta, sums)
    store_pair(out, column, sums)


@inlined
def run_four(state, block, K, tokens, stride, num_tokens, fresh):
    """`run_two` for four different blocks at once, where registers are wide and there are 32 of them."""
    q, k, v, decay, beta, out = tokens
    kept, low, high, pair = peek(decay, float32), zeros(), zeros(), 2 * block
    if fresh:
        for i in range(0, 64 * K, 64):
            store_pair(state + i, block, low)
            store_pair(state + pair + i, block, high)
    else:
        for i in range(K):
            key, row = peek(k + 4 * i, float32), state + 64 * i
            low, high = forget_read(row, block, key, kept, low), forget_read(row + pair, block, key, kept, high)
    for _ in range(num_tokens - 1):
        k_next, kept, decay = k + stride.qk, peek(decay + stride.gates, float32), decay + stride.gates
        delta_low = correction(v, 64, peek(beta, float32), low)
        delta_high = correction(v + 128, 64, peek(beta, float32), high)
        out_low, out_high, low, high = zeros(), zeros(), zeros(), zeros()
        for i in range(K):
            row, key, query = state + 64 * i, peek(k + 4 * i, float32), peek(q + 4 * i, float32)
            key_next = peek(k_next + 4 * i, float32)
            s_low, s_high = load_pair(row, block), load_pair(row + pair, block)  # before a store: see studies/17
            out_low, low, s_low = written_read(s_low, key, query, delta_low, kept, key_next, out_low, low)
            out_high, high, s_high = written_read(s_high, key, query, delta_high, kept, key_next, out_high, high)
            store_pair(row, block, s_low)
            store_pair(row + pair, block, s_high)
        store_pair(out, 64, out_low)
        store_pair(out + 128, 64, out_high)
        q, k, v, beta, out = q + stride.qk, k_next, v + stride.v, beta + stride.gates, out + stride.out
    delta_low = correction(v, 64, peek(beta, float32), low)
    delta_high = correction(v + 128, 64, peek(beta, float32), high)
    out_low, out_high = zeros(), zeros()
    for i in range(K):
        row, key, query = state + 64 * i, peek(k + 4 * i, float32), peek(q + 4 * i, float32)
        out_low = write_out(row, block, key, query, delta_low, out_low)
        out_high = write_out(row + pair, block, key, query, delta_high, out_high)
    store_pair(out, 64, out_low)
    store_pair(out + 128, 64, out_high)


# ---------------------------------------------------------------- tasks


@inlined
def num_new(batch, s):
    """Number of tokens of a request in this step."""
    return entry(batch.query_start, s + 1) - entry(batch.query_start, s)


@inlined
def addresses(a, slot, head, block, t):
    """(address of the state, Tokens) of a block of value columns at row t of the step."""
    G, H, K, V = a.num_k_heads, a.num_v_heads, a.k_head_dim, a.v_head_dim
    q = a.qk + 4 * (t * a.qk_width + head // (H // G) * K)
    v = a.v + 4 * (t * a.v_width + a.v_offset + head * V + block * BLOCK)
    decay = a.gates + 4 * (t * 2 * H + head)
    out = a.out + 4 * ((t * H + head) * V + block * BLOCK)
    state = a.state + 4 * K * ((slot * H + head) * V + block * BLOCK)
    return state, Tokens(q, q + 4 * G * K, v, decay, decay + 4 * H, out)


@inlined
def strides(a):
    """The Strides of an op."""
    return Strides(4 * a.qk_width, 4 * a.v_width, 8 * a.num_v_heads, 4 * a.num_v_heads * a.v_head_dim)


@inlined
def blocks_of(task, batch, S, H, num_blocks, size, num_threads):
    """(request, head, first block, end) of a task.

    First come requests with several tokens, `size` blocks at a time, long work before short; then whole heads of
    requests with one token, where memory is the limit, neighbours for each of the threads. Other tasks are empty.
    """
    groups = -(-num_blocks // size)
    if task < S * H * groups:
        s, block = task // (H * groups), task % groups * size
        return s, task // groups % H, block, min(block + size, num_blocks) if num_new(batch, s) > 1 else block
    task = neighbouring(task - S * H * groups, S * H, num_threads)
    return task // H, task % H, 0, num_blocks if num_new(batch, task // H) == 1 else 0


@inlined
def next_task(op, batch, num_several):
    """Claims a task. num_several: tasks of requests with several tokens, skipped where no request has several."""
    all_single = batch.num_tokens == batch.num_requests
    return fetch_add(peek(op + 8 * COUNTER, int64), 1) + (num_several if all_single else 0)


@inlined
def run_pair(a, batch, s, head, block):
    """Runs all new tokens of a request through block `block` and the next, if there is one. A single token prefetches
    the blocks that follow, after the last ones those of the next head."""
    first, K = entry(batch.query_start, s), a.k_head_dim
    state, tokens = addresses(a, entry(batch.state_slot, s), head, block, first)
    other, fresh = 64 * K * min(a.v_head_dim // BLOCK - block - 1, 1), entry(batch.position, first) == 0
    run_two(state, other, K, tokens, strides(a), num_new(batch, s), fresh, 128 * K if num_new(batch, s) == 1 else 0)


@kernel
def gated_delta_two(op, step, thread, num_threads):
    """Two blocks at a time, for targets with 16 registers of 8 lanes (or 32 of 4)."""
    a, batch = GatedDelta.read(op), StepBlock.read(step)
    S, H, num_blocks = batch.num_requests, a.num_v_heads, a.v_head_dim // BLOCK
    num_several = S * H * ((num_blocks + 1) // 2)
    task = next_task(op, batch, num_several)
    while task < num_several + S * H:
        s, head, block, end = blocks_of(task, batch, S, H, num_blocks, 2, num_threads)
        for i in range(block, end, 2):
            run_pair(a, batch, s, head, i)
        task = next_task(op, batch, num_several)


@kernel
def gated_delta_four(op, step, thread, num_threads):
    """Four blocks at a time, for targets with 32 registers of 16 lanes; single tokens and the rest two at a time."""
    a, batch = GatedDelta.read(op), StepBlock.read(step)
    S, H, K, num_blocks = batch.num_requests, a.num_v_heads, a.k_head_dim, a.v_head_dim // BLOCK
    num_several = S * H * ((num_blocks + 3) // 4)
    task = next_task(op, batch, num_several)
    while task < num_several + S * H:
        s, head, block, end = blocks_of(task, batch, S, H, num_blocks, 4, num_threads)
        if block + 4 == end and task < num_several:
            first = entry(batch.query_start, s)
            state, tokens = addresses(a, entry(batch.state_slot, s), head, block, first)
            run_four(state, 64 * K, K, tokens, strides(a), num_new(batch, s), entry(batch.position, first) == 0)
            block = end
        for i in range(block, end, 2):
            run_pair(a, batch, s, head, i)
        task = next_task(op, batch, num_several)


@kernel
def gated_delta_per_token(op, step, thread, num_threads):
    """The same bits one token at a time: all heads take a token before any takes the next."""
    a, batch = GatedDelta.read(op), StepBlock.read(step)
    K, num_blocks = a.k_head_dim, a.v_head_dim // BLOCK
    pairs = (num_blocks + 1) // 2
    for s in range(batch.num_requests):
        for t in range(entry(batch.query_start, s), entry(batch.query_start, s + 1)):
            for task in range(thread, a.num_v_heads * pairs, num_threads):
                block, fresh = task % pairs * 2, entry(batch.position, t) == 0
                state, tokens = addresses(a, entry(batch.state_slot, s), task // pairs, block, t)
                run_two(state, 64 * K * min(num_blocks - block - 1, 1), K, tokens, strides(a), 1, fresh, 0)


CPU = {
    "l2_norm": Implementation(l2_norm),
    "delta_gates": Implementation(delta_gates),
    "gated_delta": Implementation(gated_delta_four if TARGET.is_wide else gated_delta_two),
}
PER_TOKEN = {"gated_delta": Implementation(gated_delta_per_token)}
