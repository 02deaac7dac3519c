"""What a linear layer makes of its input rows: the fast kernels, each fused with the op that produces the row.

The values of a block of 32 are made and quantized in registers; nothing goes through memory in between. Bound by the
read of the row. Fused kernels give the bits of the op followed by `quantize_q8` or `round_bf16`.
"""

import numpy as np
from numba import float32, int32

from lockstep.ops.activations import (
    BIAS,
    BLOCK,
    BLOCK_BYTES,
    HIGHEST,
    INFINITY,
    NATIVE_BF16,
    ONE_127TH,
    SCALE,
    SMALLEST,
    SUMS,
    ZERO,
    magnitude,
    row_bytes,
)
from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.simd import (
    absolute,
    fma,
    lanes,
    load,
    max_lanes,
    maximum,
    poke,
    rint,
    round_bf16,
    sqrt,
    store,
    store_bf16,
    store_i8,
    sum_lanes,
    to_i32,
    where_below,
)
from lockstep.runtime.step import num_rows, number, word

ONE = np.float32(1)


@inlined
def finite(x):
    """x, or zero for NaN and infinities."""
    return where_below(absolute(x), INFINITY, x, ZERO)


@inlined
def store_q8(low, high, out, K, i):
    """Quantizes elements i .. i + 31 of a row, given as two vectors."""
    amax = max_lanes(maximum(magnitude(low), magnitude(high)))
    scale, inverse = amax * ONE_127TH, HIGHEST / amax
    if amax < SMALLEST:
        scale, inverse = ZERO, ZERO
    a, b = to_i32(rint(finite(low) * inverse)), to_i32(rint(finite(high) * inverse))
    first, last, place = sum_lanes(a), sum_lanes(b), out + i // BLOCK * BLOCK_BYTES
    store_i8(place, a)
    store_i8(place + 16, b)
    poke(place + SCALE, float32(scale))
    poke(place + BIAS, int32(-128 * (first + last)))
    poke(place + SUMS, int32(last * 65536 + (first & 65535)))


@inlined
def store_rounded(low, high, out, K, i):
    """Rounds elements i .. i + 31 of a row to bf16."""
    if NATIVE_BF16:
        store_bf16(out + 2 * i, round_bf16(low))
        store_bf16(out + 2 * i + 32, round_bf16(high))
    else:
        store(out + 4 * i, round_bf16(low))
        store(out + 4 * i + 64, round_bf16(high))


@inlined
def q8_row(out, K, t):
    return out + row_bytes(K) * t


@inlined
def bf16_row(out, K, t):
    return out + (2 if NATIVE_BF16 else 4) * K * t


@inlined
def plain(op, step, thread, num_threads, finish, row):
    """x as it is. Operands: out, x; K."""
    K = word(op, 2)
    for t in range(thread, num_rows(op, step), num_threads):
        x, out = word(op, 1) + 4 * K * t, row(word(op, 0), K, t)
        for i in range(0, K, 32):
            finish(load(x + 4 * i), load(x + 4 * i + 64), out, K, i)


@inlined
def normed(op, step, thread, num_threads, finish, row):
    """rms_norm. Operands: out, x, weight; K, eps, offset."""
    weight, K = word(op, 2), word(op, 3)
    for t in range(thread, num_rows(op, step), num_threads):
        x, out = word(op, 1) + 4 * K * t, row(word(op, 0), K, t)
        total = lanes(ZERO)
        for i in range(0, 4 * K, 64):
            v = load(x + i)
            total = fma(v, v, total)
        scale = ONE / sqrt(sum_lanes(total) / np.float32(K) + number(op, 4))
        for i in range(0, K, 32):
            low = (load(x + 4 * i) * scale) * (load(weight + 4 * i) + number(op, 5))
            high = (load(x + 4 * i + 64) * scale) * (load(weight + 4 * i + 64) + number(op, 5))
            finish(low, high, out, K, i)


@inlined
def gated(op, step, thread, num_threads, finish, row):
    """silu_mul of a row [gate K | up K]. Operands: out, x; K."""
    K = word(op, 2)
    for t in range(thread, num_rows(op, step), num_threads):
        x, out = word(op, 1) + 8 * K * t, row(word(op, 0), K, t)
        for i in range(0, K, 32):
            gate, up = x + 4 * i, x + 4 * (K + i)
            finish(silu(load(gate)) * load(up), silu(load(gate + 64)) * load(up + 64), out, K, i)


@kernel
def quantize_q8(op, step, thread, num_threads):
    plain(op, step, thread, num_threads, store_q8, q8_row)


@kernel
def norm_quantize_q8(op, step, thread, num_threads):
    normed(op, step, thread, num_threads, store_q8, q8_row)


@kernel
def silu_mul_quantize_q8(op, step, thread, num_threads):
    gated(op, step, thread, num_threads, store_q8, q8_row)


@kernel
def round_to_bf16(op, step, thread, num_threads):
    plain(op, step, thread, num_threads, store_rounded, bf16_row)


@kernel
def norm_round_bf16(op, step, thread, num_threads):
    normed(op, step, thread, num_threads, store_rounded, bf16_row)


@kernel
def silu_mul_round_bf16(op, step, thread, num_threads):
    gated(op, step, thread, num_threads, store_rounded, bf16_row)


CPU = {
    "quantize_q8": Implementation(quantize_q8),
    "rms_norm+quantize_q8": Implementation(norm_quantize_q8),
    "silu_mul+quantize_q8": Implementation(silu_mul_quantize_q8),
    "round_bf16": Implementation(round_to_bf16),
    "rms_norm+round_bf16": Implementation(norm_round_bf16),
    "silu_mul+round_bf16": Implementation(silu_mul_round_bf16),
}


@kernel
def norm_quantize_q8_per_token(op, step, thread, num_threads):
    if thread == 0:
        normed(op, step, 0, 1, store_q8, q8_row)


@kernel
def silu_mul_quantize_q8_per_token(op, step, thread, num_threads):
    if thread == 0:
        gated(op, step, 0, 1, store_q8, q8_row)


@kernel
def norm_round_bf16_per_token(op, step, thread, num_threads):
    if thread == 0:
        normed(op, step, 0, 1, store_rounded, bf16_row)


@kernel
def silu_mul_round_bf16_per_token(op, step, thread, num_threads):
    if thread == 0:
        gated(op, step, 0, 1, store_rounded, bf16_row)


# one token after another on one thread, as the ops that they are made of
PER_TOKEN = {
    "rms_norm+quantize_q8": Implementation(norm_quantize_q8_per_token),
    "silu_mul+quantize_q8": Implementation(silu_mul_quantize_q8_per_token),
    "rms_norm+round_bf16": Implementation(norm_round_bf16_per_token),
    "silu_mul+round_bf16": Implementation(silu_mul_round_bf16_per_token),
}
