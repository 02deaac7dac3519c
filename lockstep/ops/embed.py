"""Rows of the embedding matrix, decoded from the bytes of the checkpoint: the definition.

    out[t, i] = scale * table[token_id[t], i]
"""
import numpy as np
from numba import carray

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import byte_array, float_array, int_array
from lockstep.runtime.simd import pow2
from lockstep.runtime.step import TOKEN_IDS, num_rows, number, step_word, word
from lockstep.weights.finite import finite_bytes
from lockstep.weights.tensor import BLOCK_FORMATS

FORMATS = ("f32", "bf16", "f16", "q8_0", "q4_0", "q6_k", "q4_k")
F32, BF16, F16, Q8_0, Q4_0, Q6_K, Q4_K = range(7)
BLOCK_WEIGHTS = np.array([1, 1, 1, 32, 32, 256, 256])
BLOCK_BYTES = np.array([4, 2, 2, 34, 18, 210, 144])
ROWS_AT_ONCE = 1024
SMALLEST_F16 = np.float32(2.0**-24)


def format_code(format):
    """The op parameter for a weight format."""
    if format not in FORMATS:
        raise ValueError(f"embedding table of format {format!r}: allowed are {', '.join(FORMATS)}")
    return FORMATS.index(format)


def table_format(tensor):
    """The format in which a table is kept: as stored, or float32 for a block format that has no decoder here."""
    return "f32" if tensor.format in BLOCK_FORMATS and tensor.format not in FORMATS else tensor.format


def raw_bytes(weight):
    """Weight layout: uint8 [V, bytes] in the weight's format, in memory of their own, and all finite."""
    assert len(weight.parts) == 1, weight.name
    table = weight.parts[0]
    if table.format == weight.format:
        return (finite_bytes(table),)
    decoded = np.empty(table.shape, np.float32)
    for start in range(0, len(decoded), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        decoded[rows] = table.finite_f32(rows)
    return (decoded.view(np.uint8),)


RAW = ("stored bytes", raw_bytes)


@inlined
def row_bytes(format, width):
    """Bytes of a row of so many weights."""
    return width // BLOCK_WEIGHTS[format] * BLOCK_BYTES[format]


@definition
def embed(token_ids_T, table_VB, format, scale, out_TD):
    """Looks up and decodes one row per token.

    Shapes: token_ids [T] int32; table [V, B] int8, rows of D weights in a GGUF block format or little-endian floats;
      out [T, D] float32; D a multiple of 32 (256 for q4_k and q6_k).
    Error: none but q4_k's one subtraction and the product with scale.
    Order: w * scale, w as the format defines it: products of the block's float16 scale and small integers, each exact.
    Source: block_* in ggml-common.h.
    """
    for t in range(out_TD.shape[0]):
        for i in range(out_TD.shape[1]):
            out_TD[t, i] = stored_weight(table_VB[token_ids_T[t]], i, format) * scale


@definition
def stored_weight(row_B, i, format):
    """Weight number i of a row."""
    if format == F32:
        low = byte(row_B, 4 * i) | byte(row_B, 4 * i + 1) << 8
        return np.uint32(low | upper_half(row_B, 4 * i + 2)).view(np.float32)
    if format == BF16:
        return np.uint32(upper_half(row_B, 2 * i)).view(np.float32)
    if format == F16:
        return half(row_B, 2 * i)
    if format == Q8_0:
        block = 34 * (i // 32)
        return half(row_B, block) * np.float32(row_B[block + 2 + i % 32])
    if format == Q4_0:
        block = 18 * (i // 32)
        return half(row_B, block) * np.float32(nibble(row_B, block + 2 + i % 16, i % 32 // 16) - 8)
    if format == Q6_K:
        return q6_k(row_B[210 * (i // 256):], i % 256)
    return q4_k(row_B[144 * (i // 256):], i % 256)


@definition
def q6_k(block_B, i):
    """d * sc * (q - 32): q has its low four bits in bytes 0..127 and its high two in bytes 128..191."""
    part, j = i // 128, i % 128
    low = nibble(block_B, 64 * part + j % 64, j // 64)
    high = byte(block_B, 128 + 32 * part + j % 32) >> 2 * (j // 32) & 3
    return half(block_B, 208) * np.float32(block_B[192 + i // 16]) * np.float32((low | high << 4) - 32)


@definition
def q4_k(block_B, i):
    """d * sc * q - dmin * m: bytes 4..15 hold eight scales and eight minima of six bits, bytes 16..143 the codes."""
    j = i // 32
    first, second = byte(block_B, 4 + j % 4), byte(block_B, 8 + j % 4)
    scale = first & 63 if j < 4 else nibble(block_B, 12 + j % 4, 0) | first >> 6 << 4
    minimum = second & 63 if j < 4 else nibble(block_B, 12 + j % 4, 1) | second >> 6 << 4
    code = nibble(block_B, 16 + 32 * (i // 64) + i % 32, j % 2)
    return half(block_B, 0) * np.float32(scale) * np.float32(code) - half(block_B, 2) * np.float32(minimum)


@definition
def half(row_B, at):
    """The finite float16 at a byte."""
    bits = byte(row_B, at) | byte(row_B, at + 1) << 8
    exponent, fraction = bits >> 10 & 31, bits & 1023
    if exponent == 0:
        size = np.float32(fraction) * SMALLEST_F16
    else:
        size = np.float32(fraction + 1024) * pow2(np.float32(exponent - 25))
    return -size if bits >> 15 else size


@definition
def upper_half(row_B, at):
    """Two bytes as the upper half of 32 bits."""
    return byte(row_B, at) << 16 | byte(row_B, at + 1) << 24


@definition
def nibble(row_B, at, high):
    """Low or high four bits of a byte."""
    return byte(row_B, at) >> 4 * high & 15


@definition
def byte(row_B, at):
    """An unsigned byte."""
    return np.int64(row_B[at]) & 255


@kernel
def _run(op, step, thread, num_threads):
    """Op row: out, table, D, format, scale."""
    if thread == 0:
        T, D, format = num_rows(op, step), word(op, 2), word(op, 3)
        token_ids_T = carray(int_array(step_word(step, TOKEN_IDS)), (T,))
        table_VB = carray(byte_array(word(op, 1)), (1 << 40, row_bytes(format, D)))
        embed(token_ids_T, table_VB, format, number(op, 4), carray(float_array(word(op, 0)), (T, D)))


REFERENCE = {"embed": Implementation(_run, RAW)}
