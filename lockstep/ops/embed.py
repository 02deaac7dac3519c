"""Rows of the embedding matrix, decoded from the bytes of the checkpoint: the definition.

out[t, i] = scale * table[token_id[t], i]
"""

import numpy as np
from numba import carray

from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import byte_array, float_array, int_array
from lockstep.runtime.operands import Operands, output, packed
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.simd import pow2
from lockstep.runtime.step import StepBlock, num_rows
from lockstep.weights.finite import finite_bytes
from lockstep.weights.tensor import BLOCK_FORMATS

FORMATS = ("f32", "bf16", "f16", "q8_0", "q4_0", "q6_k", "q4_k", "q5_k", "q5_0", "q4_1", "q5_1")
F32, BF16, F16, Q8_0, Q4_0, Q6_K, Q4_K, Q5_K, Q5_0, Q4_1, Q5_1 = range(11)
_BLOCKS = [BLOCK_FORMATS[f] for f in FORMATS[Q8_0:]]
BLOCK_WEIGHTS = np.array([1, 1, 1, *(block.BLOCK_SIZE for block in _BLOCKS)])
BLOCK_BYTES = np.array([4, 2, 2, *(block.BLOCK_BYTES for block in _BLOCKS)])
SMALLEST_F16 = np.float32(2.0**-24)


class Embed(Operands):
    """out = scale * table[token id], row by row; format: see `format_code`."""

    out: Tensor = output("width")
    table: Weight = packed()
    width: int
    format: int
    scale: float

    def check(self):
        if self.table.shape[1:] != (self.width,) or self.format != format_code(self.table.format):
            found = f"{self.table.format} {list(self.table.shape)} with format code {self.format}"
            raise ValueError(f"Embed: the table is {found}, expected rows of {self.width} and its format's code")


def format_code(format):
    """The parameter `format` for a weight format."""
    if format not in FORMATS:
        raise ValueError(f"embedding table of format {format!r}: allowed are {', '.join(FORMATS)}")
    return FORMATS.index(format)


def raw_bytes(weight):
    """Weight layout: uint8 [V, bytes] as stored, in memory of their own, and all finite."""
    assert len(weight.parts) == 1, weight.name
    return (finite_bytes(weight.parts[0]),)


RAW = Layout("stored bytes", raw_bytes)


@inlined
def row_bytes(format, width):
    """Bytes of a row of so many weights."""
    return width // BLOCK_WEIGHTS[format] * BLOCK_BYTES[format]


@definition
def embed(token_ids_T, table_VB, format, scale, out_TD):
    """Looks up and decodes one row per token.

    Shapes: token_ids [T] int32; table [V, B] int8, rows of D weights in a GGUF block format or little-endian floats;
      out [T, D] float32; D a multiple of 32 (256 for k-quants).
    Error: none but the addition of a minimum, in formats that have one, and the product with scale.
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
        return half(row_B, block) * np.float32(low_bits(row_B, block + 2, i) - 8)
    if format == Q5_0:
        block = 22 * (i // 32)
        return half(row_B, block) * np.float32(five_bits(row_B, block + 2, i) - 16)
    if format == Q4_1:
        block = 20 * (i // 32)
        return half(row_B, block) * np.float32(low_bits(row_B, block + 4, i)) + half(row_B, block + 2)
    if format == Q5_1:
        block = 24 * (i // 32)
        return half(row_B, block) * np.float32(five_bits(row_B, block + 4, i)) + half(row_B, block + 2)
    if format == Q6_K:
        return q6_k(row_B[210 * (i // 256) :], i % 256)
    if format == Q5_K:
        block_B, j = row_B[176 * (i // 256) :], i % 256
        return k_weight(block_B, j, k_nibble(block_B, 48, j) | (byte(block_B, 16 + j % 32) >> j // 32 & 1) << 4)
    block_B, j = row_B[144 * (i // 256) :], i % 256
    return k_weight(block_B, j, k_nibble(block_B, 16, j))


@definition
def low_bits(row_B, at, i):
    """The low four bits of weight i, of a block whose 16 bytes of nibbles start at a byte."""
    return nibble(row_B, at + i % 16, i % 32 // 16)


@definition
def five_bits(row_B, at, i):
    """The code of weight i: four bytes of fifth bits, then 16 of nibbles."""
    return low_bits(row_B, at + 4, i) | (byte(row_B, at + i % 32 // 8) >> i % 8 & 1) << 4


@definition
def q6_k(block_B, i):
    """d * sc * (q - 32): q has its low four bits in bytes 0..127 and its high two in bytes 128..191."""
    part, j = i // 128, i % 128
    low = nibble(block_B, 64 * part + j % 64, j // 64)
    high = byte(block_B, 128 + 32 * part + j % 32) >> 2 * (j // 32) & 3
    return half(block_B, 208) * np.float32(block_B[192 + i // 16]) * np.float32((low | high << 4) - 32)


@definition
def k_nibble(block_B, at, i):
    """The low four bits of weight i of q4_k or q5_k: 32 bytes hold 64 weights, the first 32 in their low nibbles."""
    return nibble(block_B, at + 32 * (i // 64) + i % 32, i // 32 % 2)


@definition
def k_weight(block_B, i, code):
    """d * sc * code - dmin * m: bytes 4..15 hold eight scales and eight minima of six bits."""
    j = i // 32
    first, second = byte(block_B, 4 + j % 4), byte(block_B, 8 + j % 4)
    scale = first & 63 if j < 4 else nibble(block_B, 12 + j % 4, 0) | first >> 6 << 4
    minimum = second & 63 if j < 4 else nibble(block_B, 12 + j % 4, 1) | second >> 6 << 4
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
    if thread == 0:
        a, T = Embed.read(op), num_rows(op, step)
        token_ids_T = carray(int_array(StepBlock.read(step).token_ids), (T,))
        table_VB = carray(byte_array(a.table.codes), (1 << 40, row_bytes(a.format, a.width)))
        embed(token_ids_T, table_VB, a.format, a.scale, carray(float_array(a.out), (T, a.width)))


REFERENCE = {"embed": Implementation(_run, RAW)}
