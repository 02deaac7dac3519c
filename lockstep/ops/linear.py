"""Linear layers, out = x W^T (+ residual): the definitions, one for each weight format.

Every output element is one chain of operations over K, in ascending order and never split: it does not depend on how
many rows or features are computed with it. Weights and activations are prepared by `ops/activations.py`.
"""

import numpy as np
from numba import carray, float32, int32

from lockstep.ops.activations import NATIVE_BF16, quantized_row, row_bytes
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import byte_array, float_array
from lockstep.runtime.simd import bf16_f32, fma, peek, poke
from lockstep.runtime.step import num_rows, word
from lockstep.weights.pack import floats, padded_width, q4_0_fields, q8_0_fields
from lockstep.weights.pack_k import q4_k_fields, q5_k_fields, q6_k_fields
from lockstep.weights.pack_q5 import q4_1_fields, q5_0_fields, q5_1_fields

ZERO, ONE_128TH = np.float32(0), np.float32(1 / 128)
SMALLEST_NORMAL = np.float32(2.0**-126)
FLUSH_BELOW = 2.0**-126 - 2.0**-151


@definition
def dot_f32(x_K, w_K):
    """sum of x[k] * w[k]: acc = fma(x[k], w[k], acc) for k ascending from +0."""
    acc = ZERO
    for k in range(x_K.size):
        acc = fma(x_K[k], w_K[k], acc)
    return acc


@inlined
def daz(x):
    """Denormals are zero, of the same sign."""
    return x * ZERO if abs(x) < SMALLEST_NORMAL else x


@inlined
def flushed_fma(x, w, acc):
    """fma(daz x, daz w, daz acc), then zero iff the exact result is below 2**-126 - 2**-151 in magnitude.

    The product of two bf16 is exact in float64, and the sum exact enough near the bound to tell the side.
    """
    x, w, acc = daz(x), daz(w), daz(acc)
    result, exact = fma(x, w, acc), np.float64(x) * np.float64(w) + np.float64(acc)
    if exact != 0 and abs(exact) < FLUSH_BELOW:
        return ZERO if exact > 0 else -ZERO
    return result


@definition
def dot_bf16(x_K, w_K):
    """sum of x[k] * w[k] for bf16 values held as float32, in pairs, the odd one first.

    Order: acc = f(x[2i], w[2i], f(x[2i+1], w[2i+1], acc)) with f = `flushed_fma`, i ascending from acc = +0: what
      VDPBF16PS does. Source: Intel SDM; 0 mismatches in 96 million lanes on a Zen 5.
    """
    acc = ZERO
    for i in range(0, x_K.size, 2):
        acc = flushed_fma(x_K[i], w_K[i], flushed_fma(x_K[i + 1], w_K[i + 1], acc))
    return acc


@definition
def dot_q8(a_K, a_scale, w_K, w_scale):
    """sum over blocks of 32 of (integer dot) * scales, for signed codes of 4, 5 or 8 bits.

    Order: acc = fma(float(dot of the block), w_scale * a_scale, acc), blocks ascending from +0; the dot is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot = 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(w_K[k])
        acc = fma(np.float32(dot), w_scale[b] * a_scale[b], acc)
    return acc


@definition
def dot_q4_1(a_K, a_scale, codes_K, d, m):
    """sum of a_scale * a[k] * (d * code[k] + m), with a_scale, d and m for 32 weights.

    Order, for each block of 32, ascending from acc = +0, dots exact:
      acc = fma(float(dot), d * a_scale, acc)
      acc = fma(m * (-1 / 128), float(-128 * sum of a) * a_scale, acc), where dividing by 128 is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot, total = 0, 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(codes_K[k])
            total += np.int64(a_K[k])
        acc = fma(np.float32(dot), d[b] * a_scale[b], acc)
        acc = fma(m[b] * -ONE_128TH, np.float32(-128 * total) * a_scale[b], acc)
    return acc


@definition
def dot_q4_k(a_K, a_scale, codes_K, d, dmin, sc, m):
    """sum of a_scale * a[k] * (d * sc * code[k] - dmin * m), with d, dmin for 256 weights and a_scale, sc, m for 32.

    Codes of 4 or 5 bits; d * sc and dmin * m are exact.

    Order, for each block of 32, ascending from acc = +0, dots exact:
      acc = fma(float(dot), (d * sc) * a_scale, acc)
      acc = fma((dmin * m) / 128, float(-128 * sum of a) * a_scale, acc), where dividing by 128 is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot, total = 0, 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(codes_K[k])
            total += np.int64(a_K[k])
        acc = fma(np.float32(dot), (d[b // 8] * sc[b]) * a_scale[b], acc)
        acc = fma((dmin[b // 8] * m[b]) * ONE_128TH, np.float32(-128 * total) * a_scale[b], acc)
    return acc


@definition
def dot_q6_k(a_K, a_scale, codes_K, sc, d):
    """sum of a_scale * a[k] * d * sc * code[k], with d for 256 weights, a_scale for 32 and the integer sc for 16.

    Order: acc = fma(float(sc0 * dot0 + sc1 * dot1), d * a_scale, acc) for each block of 32, ascending from +0; the
      integers, dots of the block's first and last 16, are exact and below 2**24.
    """
    acc = ZERO
    for b in range(a_scale.size):
        total = 0
        for k in range(32 * b, 32 * b + 32):
            total += np.int64(sc[k // 16]) * np.int64(a_K[k]) * np.int64(codes_K[k])
        acc = fma(np.float32(total), d[b // 8] * a_scale[b], acc)
    return acc


@inlined
def _finish(op, t, n, params, value):
    """Adds the residual, if the op has one, and stores out[t, column + n]. params: as in linear_cpu.drive."""
    width, has_residual, column = word(op, params + 1), word(op, params + 2), word(op, params + 3)
    offset = 4 * (width * t + column + n)
    poke(word(op, 0) + offset, float32(peek(word(op, 2) + offset, float32) + value if has_residual else value))


@inlined
def _share(total, thread, num_threads):
    """The thread's contiguous share of the output features."""
    return range(total * thread // num_threads, total * (thread + 1) // num_threads)


@kernel
def _linear_f32(op, step, thread, num_threads):
    K, N = word(op, 4), word(op, 8)
    for n in _share(N, thread, num_threads):
        w = carray(float_array(word(op, 3) + 4 * K * n), (K,))
        for t in range(num_rows(op, step)):
            _finish(op, t, n, 4, dot_f32(carray(float_array(word(op, 1) + 4 * K * t), (K,)), w))


@inlined
def _bf16_activation(x, i):
    return bf16_f32(peek(x + 2 * i, int32)) if NATIVE_BF16 else peek(x + 4 * i, float32)


@kernel
def _linear_bf16(op, step, thread, num_threads):
    K, N = word(op, 4), word(op, 8)
    for t in range(num_rows(op, step)):
        x = np.empty(K, np.float32)
        for k in range(K):
            x[k] = _bf16_activation(word(op, 1) + (2 if NATIVE_BF16 else 4) * K * t, k)
        for n in _share(N, thread, num_threads):
            _finish(op, t, n, 4, dot_bf16(x, carray(float_array(word(op, 3) + 4 * K * n), (K,))))


@inlined
def _floats(op, operand, n, count):
    """Row n of a float32 operand with so many values in a row."""
    return carray(float_array(word(op, operand) + 4 * count * n), (count,))


@kernel
def _linear_q8(op, step, thread, num_threads):
    K, N = word(op, 5), word(op, 9)
    for n in _share(N, thread, num_threads):
        codes, scale = carray(byte_array(word(op, 3) + K * n), (K,)), _floats(op, 4, n, K // 32)
        for t in range(num_rows(op, step)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * t, K)
            _finish(op, t, n, 5, dot_q8(a, a_scale, codes, scale))


@kernel
def _linear_q4_1(op, step, thread, num_threads):
    K, N = word(op, 6), word(op, 10)
    for n in _share(N, thread, num_threads):
        codes = carray(byte_array(word(op, 3) + K * n), (K,))
        d, m = _floats(op, 4, n, K // 32), _floats(op, 5, n, K // 32)
        for t in range(num_rows(op, step)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * t, K)
            _finish(op, t, n, 6, dot_q4_1(a, a_scale, codes, d, m))


@kernel
def _linear_q4_k(op, step, thread, num_threads):
    K, N = word(op, 8), word(op, 12)
    for n in _share(N, thread, num_threads):
        codes = carray(byte_array(word(op, 3) + K * n), (K,))
        d, dmin = _floats(op, 4, n, K // 256), _floats(op, 5, n, K // 256)
        sc, m = _floats(op, 6, n, K // 32), _floats(op, 7, n, K // 32)
        for t in range(num_rows(op, step)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * t, K)
            _finish(op, t, n, 8, dot_q4_k(a, a_scale, codes, d, dmin, sc, m))


@kernel
def _linear_q6_k(op, step, thread, num_threads):
    K, N = word(op, 6), word(op, 10)
    for n in _share(N, thread, num_threads):
        codes = carray(byte_array(word(op, 3) + K * n), (K,))
        sc = carray(byte_array(word(op, 4) + K // 16 * n), (K // 16,))
        d = _floats(op, 5, n, K // 256)
        for t in range(num_rows(op, step)):
            a, a_scale = quantized_row(word(op, 1) + row_bytes(K) * t, K)
            _finish(op, t, n, 6, dot_q6_k(a, a_scale, codes, sc, d))


def _rows(weight, fields):
    """The fields of all rows of a weight, piece after piece, and of zeros up to whole panels as in `weights.pack`."""
    pieces = [fields(part, slice(None)) for part in weight.parts]
    joined = (np.concatenate(arrays) for arrays in zip(*pieces))
    return tuple(np.pad(a, ((0, padded_width(len(a)) - len(a)), (0, 0))) for a in joined)


def f32_rows(weight):
    """float32 [N, K]."""
    return _rows(weight, lambda part, rows: (floats(part, rows),))


def bf16_rows(weight):
    """Values rounded to bf16, as float32 [N, K]."""
    import ml_dtypes

    return _rows(weight, lambda part, rows: (floats(part, rows).astype(ml_dtypes.bfloat16).astype(np.float32),))


def q8_0_rows(weight):
    """Codes int8 [N, K] and scales float32 [N, K / 32]."""
    codes, scales = _rows(weight, q8_0_fields)
    return codes, scales.astype(np.float32)


def q4_0_rows(weight):
    """Codes -8..7 as int8 [N, K] and scales float32 [N, K / 32]."""
    codes, scales = _rows(weight, q4_0_fields)
    return codes.astype(np.int8) - np.int8(8), scales.astype(np.float32)


def q5_0_rows(weight):
    """Codes -16..15 as int8 [N, K] and scales float32 [N, K / 32]."""
    codes, scales = _rows(weight, q5_0_fields)
    return codes.astype(np.int8) - np.int8(16), scales.astype(np.float32)


def _as_floats(fields):
    """Codes as int8, everything else as float32."""
    codes, *rest = fields
    return codes.astype(np.int8), *[a.astype(np.float32) for a in rest]


def q4_1_rows(weight):
    """Codes 0..15 as int8 [N, K]; d, m float32 [N, K / 32]."""
    return _as_floats(_rows(weight, q4_1_fields))


def q5_1_rows(weight):
    """Codes 0..31 as int8 [N, K]; d, m float32 [N, K / 32]."""
    return _as_floats(_rows(weight, q5_1_fields))


def q4_k_rows(weight):
    """Codes 0..15 as int8 [N, K]; d, dmin float32 [N, K / 256]; sc, m as float32 [N, K / 32]."""
    return _as_floats(_rows(weight, q4_k_fields))


def q5_k_rows(weight):
    """The same with codes 0..31."""
    return _as_floats(_rows(weight, q5_k_fields))


def q6_k_rows(weight):
    """Codes -32..31 int8 [N, K], sc int8 [N, K / 16], d float32 [N, K / 256]."""
    codes, sc, d = _rows(weight, q6_k_fields)
    return codes, sc, d.astype(np.float32)


REFERENCE = {
    "linear_f32": Implementation(_linear_f32, ("f32 rows", f32_rows)),
    "linear_f16": Implementation(_linear_f32, ("f32 rows", f32_rows)),
    "linear_bf16": Implementation(_linear_bf16, ("bf16 rows", bf16_rows)),
    "linear_q8_0": Implementation(_linear_q8, ("q8_0 rows", q8_0_rows)),
    "linear_q4_0": Implementation(_linear_q8, ("q4_0 rows", q4_0_rows)),
    "linear_q5_0": Implementation(_linear_q8, ("q5_0 rows", q5_0_rows)),
    "linear_q4_1": Implementation(_linear_q4_1, ("q4_1 rows", q4_1_rows)),
    "linear_q5_1": Implementation(_linear_q4_1, ("q5_1 rows", q5_1_rows)),
    "linear_q4_k": Implementation(_linear_q4_k, ("q4_k rows", q4_k_rows)),
    "linear_q5_k": Implementation(_linear_q4_k, ("q5_k rows", q5_k_rows)),
    "linear_q6_k": Implementation(_linear_q6_k, ("q6_k rows", q6_k_rows)),
}
