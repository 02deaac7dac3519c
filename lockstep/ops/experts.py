"""The linear layers of a mixture of experts: the definitions.

A token's top_k experts make X pairs (token, rank). `group_experts` of `ops/moe.py` puts them in order of expert, and
the ops here work on that order, T X rows in all, so that an expert's rows lie together and its weights are read once:

    expert_rows     row s = the prepared input of the token that pair order[s] belongs to
    expert_linear   out[s] = x[s] W[e]^T, where e is the expert of row s
    expert_gated    row s = silu(gate) * up, prepared
    expert_scatter  y[order[s]] = x[s], back to the order of pairs

Prepared means: as it is for f32 and f16 weights, rounded for bf16, quantized for the others (`ops/activations.py`).
Every output element is what `ops/linear.py` defines for that row and weight, whichever rows share the expert.
"""

import numpy as np
from numba import carray, float32, int32

from lockstep.ops.activations import NATIVE_BF16, quantize_row, quantized_row, row_bytes
from lockstep.ops.linear import (
    bf16_rows,
    dot_bf16,
    dot_f32,
    dot_q4_1,
    dot_q4_k,
    dot_q8,
    f32_rows,
    q4_0_rows,
    q4_1_rows,
    q5_0_rows,
    q5_1_rows,
    q5_k_rows,
    q8_0_rows,
)
from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import byte_array, float_array
from lockstep.runtime.simd import bf16_bits, bf16_f32, peek, poke, round_bf16
from lockstep.runtime.step import num_rows, word


@inlined
def pair_at(order, s):
    """The pair in row s: token * top_k + rank."""
    return np.int64(peek(order + 4 * s, int32))


@inlined
def bf16_bytes(width):
    return (2 if NATIVE_BF16 else 4) * width


@definition
def put_f32(x_K, out):
    """A row as it is."""
    for k in range(x_K.size):
        poke(out + 4 * k, x_K[k])


@definition
def put_bf16(x_K, out):
    """A row rounded to bf16."""
    for k in range(x_K.size):
        if NATIVE_BF16:
            poke(out + 2 * k, bf16_bits(round_bf16(x_K[k])))
        else:
            poke(out + 4 * k, round_bf16(x_K[k]))


@inlined
def _floats(address, count):
    return carray(float_array(address), (count,))


@inlined
def _gather(op, step, put, out_bytes):
    """Op row: out, x, order, K, X."""
    K, X = word(op, 3), word(op, 4)
    for s in range(num_rows(op, step) * X):
        put(_floats(word(op, 1) + 4 * K * (pair_at(word(op, 2), s) // X), K), word(op, 0) + out_bytes * s)


@inlined
def _gate(op, step, put, out_bytes):
    """Op row: out, x, K, X. x row s: gate [K], up [K]."""
    K = word(op, 2)
    row_K = np.empty(K, np.float32)
    for s in range(num_rows(op, step) * word(op, 3)):
        x = _floats(word(op, 1) + 8 * K * s, 2 * K)
        for k in range(K):
            row_K[k] = silu(x[k]) * x[K + k]
        put(row_K, word(op, 0) + out_bytes * s)


@kernel
def _rows_f32(op, step, thread, num_threads):
    if thread == 0:
        _gather(op, step, put_f32, 4 * word(op, 3))


@kernel
def _rows_bf16(op, step, thread, num_threads):
    if thread == 0:
        _gather(op, step, put_bf16, bf16_bytes(word(op, 3)))


@kernel
def _rows_q8(op, step, thread, num_threads):
    if thread == 0:
        _gather(op, step, quantize_row, row_bytes(word(op, 3)))


@kernel
def _gated_f32(op, step, thread, num_threads):
    if thread == 0:
        _gate(op, step, put_f32, 4 * word(op, 2))


@kernel
def _gated_bf16(op, step, thread, num_threads):
    if thread == 0:
        _gate(op, step, put_bf16, bf16_bytes(word(op, 2)))


@kernel
def _gated_q8(op, step, thread, num_threads):
    if thread == 0:
        _gate(op, step, quantize_row, row_bytes(word(op, 2)))


@kernel
def _scatter(op, step, thread, num_threads):
    """Op row: out, x, order, D, X."""
    D = word(op, 3)
    if thread == 0:
        for s in range(num_rows(op, step) * word(op, 4)):
            put_f32(_floats(word(op, 1) + 4 * D * s, D), word(op, 0) + 4 * D * pair_at(word(op, 2), s))


@definition
def _activation_bf16(x, K):
    row_K = np.empty(K, np.float32)
    for k in range(K):
        row_K[k] = bf16_f32(peek(x + 2 * k, int32)) if NATIVE_BF16 else peek(x + 4 * k, float32)
    return row_K


@kernel
def _linear_f32(op, step, thread, num_threads):
    """Op row: out, x, expert_start, weights [E N, K], K, N, E."""
    K, N, E = word(op, 4), word(op, 5), word(op, 6)
    for e in range(E if thread == 0 else 0):
        for s in range(pair_at(word(op, 2), e), pair_at(word(op, 2), e + 1)):
            for n in range(N):
                w = _floats(word(op, 3) + 4 * K * (e * N + n), K)
                poke(word(op, 0) + 4 * (N * s + n), dot_f32(_floats(word(op, 1) + 4 * K * s, K), w))


@kernel
def _linear_bf16(op, step, thread, num_threads):
    """Op row: as `_linear_f32`."""
    K, N, E = word(op, 4), word(op, 5), word(op, 6)
    for e in range(E if thread == 0 else 0):
        for s in range(pair_at(word(op, 2), e), pair_at(word(op, 2), e + 1)):
            x = _activation_bf16(word(op, 1) + bf16_bytes(K) * s, K)
            for n in range(N):
                poke(word(op, 0) + 4 * (N * s + n), dot_bf16(x, _floats(word(op, 3) + 4 * K * (e * N + n), K)))


@kernel
def _linear_q8(op, step, thread, num_threads):
    """Op row: out, x, expert_start, codes [E N, K], scales [E N, K / 32], K, N, E."""
    K, N, E = word(op, 5), word(op, 6), word(op, 7)
    for e in range(E if thread == 0 else 0):
        for s in range(pair_at(word(op, 2), e), pair_at(word(op, 2), e + 1)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * s, K)
            for n in range(N):
                codes = carray(byte_array(word(op, 3) + K * (e * N + n)), (K,))
                scale = _floats(word(op, 4) + K // 8 * (e * N + n), K // 32)
                poke(word(op, 0) + 4 * (N * s + n), dot_q8(a, a_scale, codes, scale))


@kernel
def _linear_q4_1(op, step, thread, num_threads):
    """Op row: out, x, expert_start, codes [E N, K], d [E N, K / 32], m [E N, K / 32], K, N, E."""
    K, N, E = word(op, 6), word(op, 7), word(op, 8)
    for e in range(E if thread == 0 else 0):
        for s in range(pair_at(word(op, 2), e), pair_at(word(op, 2), e + 1)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * s, K)
            for n in range(e * N, e * N + N):
                codes = carray(byte_array(word(op, 3) + K * n), (K,))
                d, m = _floats(word(op, 4) + K // 8 * n, K // 32), _floats(word(op, 5) + K // 8 * n, K // 32)
                poke(word(op, 0) + 4 * (N * s + n - e * N), dot_q4_1(a, a_scale, codes, d, m))


@kernel
def _linear_q5_k(op, step, thread, num_threads):
    """Op row: out, x, expert_start, codes [E N, K], d, dmin [E N, K / 256], sc, m [E N, K / 32], K, N, E."""
    K, N, E = word(op, 8), word(op, 9), word(op, 10)
    for e in range(E if thread == 0 else 0):
        for s in range(pair_at(word(op, 2), e), pair_at(word(op, 2), e + 1)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * s, K)
            for n in range(e * N, e * N + N):
                codes = carray(byte_array(word(op, 3) + K * n), (K,))
                d, dmin = _floats(word(op, 4) + K // 64 * n, K // 256), _floats(word(op, 5) + K // 64 * n, K // 256)
                sc, m = _floats(word(op, 6) + K // 8 * n, K // 32), _floats(word(op, 7) + K // 8 * n, K // 32)
                poke(word(op, 0) + 4 * (N * s + n - e * N), dot_q4_k(a, a_scale, codes, d, dmin, sc, m))


REFERENCE = {
    "expert_rows_f32": Implementation(_rows_f32),
    "expert_rows_bf16": Implementation(_rows_bf16),
    "expert_rows_q8": Implementation(_rows_q8),
    "expert_gated_f32": Implementation(_gated_f32),
    "expert_gated_bf16": Implementation(_gated_bf16),
    "expert_gated_q8": Implementation(_gated_q8),
    "expert_scatter": Implementation(_scatter),
    "expert_linear_f32": Implementation(_linear_f32, ("f32 rows", f32_rows)),
    "expert_linear_f16": Implementation(_linear_f32, ("f32 rows", f32_rows)),
    "expert_linear_bf16": Implementation(_linear_bf16, ("bf16 rows", bf16_rows)),
    "expert_linear_q8_0": Implementation(_linear_q8, ("q8_0 rows", q8_0_rows)),
    "expert_linear_q4_0": Implementation(_linear_q8, ("q4_0 rows", q4_0_rows)),
    "expert_linear_q4_1": Implementation(_linear_q4_1, ("q4_1 rows", q4_1_rows)),
    "expert_linear_q5_0": Implementation(_linear_q8, ("q5_0 rows", q5_0_rows)),
    "expert_linear_q5_1": Implementation(_linear_q4_1, ("q5_1 rows", q5_1_rows)),
    "expert_linear_q5_k": Implementation(_linear_q5_k, ("q5_k rows", q5_k_rows)),
}
