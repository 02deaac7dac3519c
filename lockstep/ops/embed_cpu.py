"""Rows of the embedding matrix: the fast kernel. Bound by the read of the rows needed; nothing else is touched."""

import numpy as np
from numba import int8, int32

from lockstep.ops.embed import BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, RAW, Embed, row_bytes
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.simd import (
    bit_and,
    lane_numbers,
    load,
    load_bf16,
    load_f16,
    load_i8,
    load_u8,
    peek,
    peek_f16,
    shift_right,
    store,
    to_f32,
)
from lockstep.runtime.step import StepBlock, entry, num_rows

EIGHT, SIXTEEN, THIRTY_TWO = np.int32(8), np.int32(16), np.int32(32)


@kernel
def embed(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a, token_ids = Embed.read(op), StepBlock.read(step).token_ids
    size = row_bytes(a.format, a.width)
    for t in range(thread, num_rows(op, step), num_threads):
        row = a.table.codes + size * entry(token_ids, t)
        decode_row(row, a.format, size, a.scale, a.out + 4 * a.width * t)


@inlined
def decode_row(row, format, size, scale, out):
    """One row of `size` bytes into float32."""
    if format == F32:
        for i in range(0, size, 64):
            store(out + i, load(row + i) * scale)
    elif format == BF16:
        for i in range(0, size, 32):
            store(out + 2 * i, load_bf16(row + i) * scale)
    elif format == F16:
        for i in range(0, size, 32):
            store(out + 2 * i, load_f16(row + i) * scale)
    elif format == Q8_0:
        for b in range(size // 34):
            decode_q8_0(row + 34 * b, scale, out + 128 * b)
    elif format == Q4_0:
        for b in range(size // 18):
            decode_q4_0(row + 18 * b, scale, out + 128 * b)
    elif format == Q6_K:
        for b in range(size // 210):
            decode_q6_k(row + 210 * b, scale, out + 1024 * b)
    elif format == Q5_0:
        for b in range(size // 22):
            decode_q5_0(row + 22 * b, scale, out + 128 * b)
    elif format == Q4_1:
        for b in range(size // 20):
            decode_q4_1(row + 20 * b, scale, out + 128 * b)
    elif format == Q5_1:
        for b in range(size // 24):
            decode_q5_1(row + 24 * b, scale, out + 128 * b)
    elif format == Q5_K:
        for b in range(size // 176):
            decode_q5_k(row + 176 * b, scale, out + 1024 * b)
    else:
        for b in range(size // 144):
            decode_q4_k(row + 144 * b, scale, out + 1024 * b)


@inlined
def decode_q8_0(block, scale, out):
    d = peek_f16(block)
    for i in range(0, 32, 16):
        store(out + 4 * i, to_f32(load_i8(block + 2 + i)) * d * scale)


@inlined
def decode_q4_0(block, scale, out):
    d, codes = peek_f16(block), load_u8(block + 2)
    store(out, to_f32(bit_and(codes, 15) - EIGHT) * d * scale)
    store(out + 64, to_f32(shift_right(codes, 4) - EIGHT) * d * scale)


@inlined
def five_bits(fifth, codes):
    """The first and the last 16 of 32 codes 0..31, from the addresses of their four bytes of fifth bits and 16 of
    nibbles."""
    bits, low = peek(fifth, int32), load_u8(codes)
    first, last = shift_right(bits, lane_numbers()), shift_right(bits, lane_numbers() + SIXTEEN)
    return bit_and(low, 15) + bit_and(first, 1) * SIXTEEN, shift_right(low, 4) + bit_and(last, 1) * SIXTEEN


@inlined
def decode_q5_0(block, scale, out):
    d = peek_f16(block)
    first, last = five_bits(block + 2, block + 6)
    store(out, to_f32(first - SIXTEEN) * d * scale)
    store(out + 64, to_f32(last - SIXTEEN) * d * scale)


@inlined
def decode_q4_1(block, scale, out):
    codes = load_u8(block + 4)
    store_affine(bit_and(codes, 15), shift_right(codes, 4), block, scale, out)


@inlined
def decode_q5_1(block, scale, out):
    first, last = five_bits(block + 4, block + 8)
    store_affine(first, last, block, scale, out)


@inlined
def store_affine(first, last, block, scale, out):
    """d * code + m for the first and the last 16 codes."""
    d, m = peek_f16(block), peek_f16(block + 2)
    store(out, (to_f32(first) * d + m) * scale)
    store(out + 64, (to_f32(last) * d + m) * scale)


@inlined
def decode_q6_k(block, scale, out):
    """Sixteen bytes of high bits serve four times sixteen weights, 32 apart."""
    for i in range(0, 64, 16):
        part, j = i // 32, i % 32
        low, high = block + 64 * part + j, load_u8(block + 128 + 32 * part + j)
        first, second = load_u8(low), load_u8(low + 32)
        sc, to = block + 192 + 8 * part + j // 16, out + 512 * part + 4 * j
        store_q6_k(bit_and(first, 15), high, block, sc, scale, to)
        store_q6_k(bit_and(second, 15), shift_right(high, 2), block, sc + 2, scale, to + 128)
        store_q6_k(shift_right(first, 4), shift_right(high, 4), block, sc + 4, scale, to + 256)
        store_q6_k(shift_right(second, 4), shift_right(high, 6), block, sc + 6, scale, to + 384)


@inlined
def store_q6_k(low, high, block, sc, scale, out):
    d_sc = peek_f16(block + 208) * np.float32(peek(sc, int8))
    store(out, to_f32(low + bit_and(high, 3) * SIXTEEN - THIRTY_TWO) * d_sc * scale)


@inlined
def decode_q4_k(block, scale, out):
    """Pairs of 32 weights share 32 bytes of codes: the low nibbles, then the high ones."""
    for pair in range(4):
        for i in range(0, 32, 16):
            codes = load_u8(block + 16 + 32 * pair + i)
            store_pair(bit_and(codes, 15), shift_right(codes, 4), block, pair, scale, out + 256 * pair + 4 * i)


@inlined
def decode_q5_k(block, scale, out):
    """As q4_k; bit g of byte i of the fifth bits belongs to weight i of the g-th 32."""
    for pair in range(4):
        for i in range(0, 32, 16):
            codes, fifth = load_u8(block + 48 + 32 * pair + i), shift_right(load_u8(block + 16 + i), 2 * pair)
            low = bit_and(codes, 15) + bit_and(fifth, 1) * SIXTEEN
            high = shift_right(codes, 4) + bit_and(shift_right(fifth, 1), 1) * SIXTEEN
            store_pair(low, high, block, pair, scale, out + 256 * pair + 4 * i)


@inlined
def store_pair(low, high, block, pair, scale, out):
    """Sixteen codes of the first 32 weights of a pair and of the second 32, as weights."""
    low_scale, low_minimum = q4_k_scale(block, 2 * pair)
    high_scale, high_minimum = q4_k_scale(block, 2 * pair + 1)
    store(out, (to_f32(low) * low_scale - low_minimum) * scale)
    store(out + 128, (to_f32(high) * high_scale - high_minimum) * scale)


@inlined
def q4_k_scale(block, j):
    """d * sc and dmin * m of the j-th 32 weights."""
    first, second, third = byte(block + 4 + j % 4), byte(block + 8 + j % 4), byte(block + 12 + j % 4)
    sc = first & 63 if j < 4 else third & 15 | first >> 6 << 4
    m = second & 63 if j < 4 else third >> 4 | second >> 6 << 4
    return peek_f16(block) * np.float32(sc), peek_f16(block + 2) * np.float32(m)


@inlined
def byte(address):
    return np.int64(peek(address, int8)) & 255


CPU = {"embed": Implementation(embed, RAW)}
