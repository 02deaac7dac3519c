"""The linear layers of a mixture of experts: the fast kernels.

One expert's rows lie together, so each expert is a linear layer of few rows, made of the tiles of `linear_cpu`. Few
tokens are bound by the stream of the chosen experts' weights, many by arithmetic. Threads claim (expert, run of
panels); an expert that no token chose costs one comparison.
"""

from numba import int64

from lockstep.ops.activations import row_bytes as q8_row_bytes
from lockstep.ops.activations_cpu import store_q8, store_rounded
from lockstep.ops.experts import bf16_bytes, pair_at
from lockstep.ops.linear_cpu import BF16_BYTES, CACHE_BYTES, COLS, MAX_ROWS, merged, together
from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import fetch_add
from lockstep.runtime.simd import load, peek, store
from lockstep.runtime.step import COUNTER, num_rows, word
from lockstep.runtime.tiles_dots import Q4_1_BYTES, Q5_0_BYTES, Q5_1_BYTES
from lockstep.runtime.tiles_k import Q5_K_BYTES
from lockstep.runtime.tiles_linear import (
    BF16_TILE,
    F16_TILE,
    F32_TILE,
    Q4_0_TILE,
    Q4_1_TILE,
    Q5_0_TILE,
    Q5_1_TILE,
    Q5_K_TILE,
    Q8_0_TILE,
)
from lockstep.weights.pack import pack_bf16, pack_f16, pack_f32, pack_q4_0, pack_q8_0
from lockstep.weights.pack_k import pack_q5_k
from lockstep.weights.pack_q5 import pack_q4_1, pack_q5_0, pack_q5_1

CLAIM = 8  # panels that a thread takes at a time


@inlined
def store_plain(low, high, out, K, i):
    """Elements i .. i + 31 of a row as they are."""
    store(out + 4 * i, low)
    if i + 16 < K:
        store(out + 4 * i + 64, high)


@inlined
def gather(op, step, thread, num_threads, finish, out_bytes):
    """Rows are dealt to threads in turn. Operands: out, x, order; K, X."""
    K, X = word(op, 3), word(op, 4)
    for s in range(thread, num_rows(op, step) * X, num_threads):
        x, out = word(op, 1) + 4 * K * (pair_at(word(op, 2), s) // X), word(op, 0) + out_bytes * s
        for i in range(0, K, 32):
            finish(load(x + 4 * i), load(x + 4 * i + 64), out, K, i)


@inlined
def gate(op, step, thread, num_threads, finish, out_bytes):
    """Rows are dealt to threads in turn. Operands: out, x; K, X."""
    K = word(op, 2)
    for s in range(thread, num_rows(op, step) * word(op, 3), num_threads):
        x, out = word(op, 1) + 8 * K * s, word(op, 0) + out_bytes * s
        for i in range(0, K, 32):
            g, up = x + 4 * i, x + 4 * (K + i)
            finish(silu(load(g)) * load(up), silu(load(g + 64)) * load(up + 64), out, K, i)


@kernel
def rows_f32(op, step, thread, num_threads):
    gather(op, step, thread, num_threads, store_plain, 4 * word(op, 3))


@kernel
def rows_bf16(op, step, thread, num_threads):
    gather(op, step, thread, num_threads, store_rounded, bf16_bytes(word(op, 3)))


@kernel
def rows_q8(op, step, thread, num_threads):
    gather(op, step, thread, num_threads, store_q8, q8_row_bytes(word(op, 3)))


@kernel
def gated_f32(op, step, thread, num_threads):
    gate(op, step, thread, num_threads, store_plain, 4 * word(op, 2))


@kernel
def gated_bf16(op, step, thread, num_threads):
    gate(op, step, thread, num_threads, store_rounded, bf16_bytes(word(op, 2)))


@kernel
def gated_q8(op, step, thread, num_threads):
    gate(op, step, thread, num_threads, store_q8, q8_row_bytes(word(op, 2)))


@kernel
def scatter(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; D a multiple of 16. Operands: out, x, order; D, X."""
    row = 4 * word(op, 3)
    for s in range(thread, num_rows(op, step) * word(op, 4), num_threads):
        x, out = word(op, 1) + row * s, word(op, 0) + row * pair_at(word(op, 2), s)
        for i in range(0, row, 64):
            store(out + i, load(x + i))


@merged
def drive(op, step, format, params, w, panel, scales, row):
    """The thread's share of all experts' products. Operands 0 to 2 are out, x and expert_start; params K, N, E."""
    K, num_panels, E = word(op, params), word(op, params + 1) // 16, word(op, params + 2)
    at_once = max(MAX_ROWS, CACHE_BYTES // row // MAX_ROWS * MAX_ROWS)
    claims, counter = (num_panels + CLAIM - 1) // CLAIM, peek(op + 8 * COUNTER, int64)
    task = fetch_add(counter, 1)
    while task < E * claims:
        e, first = task // claims, task % claims * CLAIM
        start, stop = pair_at(word(op, 2), e), pair_at(word(op, 2), e + 1)
        for s in range(start, stop, at_once):
            for p in range(first, min(first + CLAIM, num_panels), COLS):
                at = e * num_panels + p
                together(
                    format,
                    word(op, 1) + row * s,
                    row,
                    w + panel * at,
                    panel,
                    scales + K * at,
                    K,
                    K,
                    0,
                    word(op, 0) + 64 * (num_panels * s + p),
                    64 * num_panels,
                    num_panels - p,
                    0,
                    w + panel * (at + COLS),
                    scales + K * (at + COLS),
                    min(at_once, stop - s),
                )
        task = fetch_add(counter, 1)


@kernel
def linear_f32(op, step, thread, num_threads):
    drive(op, step, F32_TILE, 4, word(op, 3), 64 * word(op, 4), 0, 4 * word(op, 4))


@kernel
def linear_f16(op, step, thread, num_threads):
    drive(op, step, F16_TILE, 4, word(op, 3), 32 * word(op, 4), 0, 4 * word(op, 4))


@kernel
def linear_bf16(op, step, thread, num_threads):
    drive(op, step, BF16_TILE, 4, word(op, 3), 32 * word(op, 4), 0, BF16_BYTES * word(op, 4))


@kernel
def linear_q8_0(op, step, thread, num_threads):
    drive(op, step, Q8_0_TILE, 5, word(op, 3), 16 * word(op, 5), word(op, 4), q8_row_bytes(word(op, 5)))


@kernel
def linear_q4_0(op, step, thread, num_threads):
    drive(op, step, Q4_0_TILE, 5, word(op, 3), 8 * word(op, 5), word(op, 4), q8_row_bytes(word(op, 5)))


@kernel
def linear_q4_1(op, step, thread, num_threads):
    panel, row = word(op, 4) // 32 * Q4_1_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, Q4_1_TILE, 4, word(op, 3), panel, 0, row)


@kernel
def linear_q5_0(op, step, thread, num_threads):
    panel, row = word(op, 5) // 32 * Q5_0_BYTES, q8_row_bytes(word(op, 5))
    drive(op, step, Q5_0_TILE, 5, word(op, 3), panel, word(op, 4), row)


@kernel
def linear_q5_1(op, step, thread, num_threads):
    panel, row = word(op, 4) // 32 * Q5_1_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, Q5_1_TILE, 4, word(op, 3), panel, 0, row)


@kernel
def linear_q5_k(op, step, thread, num_threads):
    panel, row = word(op, 4) // 256 * Q5_K_BYTES, q8_row_bytes(word(op, 4))
    drive(op, step, Q5_K_TILE, 4, word(op, 3), panel, 0, row)


CPU = {
    "expert_rows_f32": Implementation(rows_f32),
    "expert_rows_bf16": Implementation(rows_bf16),
    "expert_rows_q8": Implementation(rows_q8),
    "expert_gated_f32": Implementation(gated_f32),
    "expert_gated_bf16": Implementation(gated_bf16),
    "expert_gated_q8": Implementation(gated_q8),
    "expert_scatter": Implementation(scatter),
    "expert_linear_f32": Implementation(linear_f32, ("f32 panels", pack_f32)),
    "expert_linear_f16": Implementation(linear_f16, ("f16 panels", pack_f16)),
    "expert_linear_bf16": Implementation(linear_bf16, ("bf16 panels", pack_bf16), flushes=True),
    "expert_linear_q8_0": Implementation(linear_q8_0, ("q8_0 panels", pack_q8_0)),
    "expert_linear_q4_0": Implementation(linear_q4_0, ("q4_0 panels", pack_q4_0)),
    "expert_linear_q4_1": Implementation(linear_q4_1, ("q4_1 panels", pack_q4_1)),
    "expert_linear_q5_0": Implementation(linear_q5_0, ("q5_0 panels", pack_q5_0)),
    "expert_linear_q5_1": Implementation(linear_q5_1, ("q5_1 panels", pack_q5_1)),
    "expert_linear_q5_k": Implementation(linear_q5_k, ("q5_k panels", pack_q5_k)),
}
