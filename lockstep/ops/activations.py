"""What a linear layer makes of its input rows before it multiplies: the definitions.

Weights of 4 to 8 bits multiply int8 activations with one float32 scale per block of 32; bf16 weights multiply
activations rounded to bf16. Both are done per row, never per batch.

A row of quantized activations is K / 32 blocks of 44 bytes, so that a kernel needs one pointer a row:
    32 int8 codes | float32 scale | int32 bias | int16 sum of the first 16 codes | int16 sum of the last 16
where bias = -128 * (sum of the block's codes) is what weights stored as code + 128 add too much, and the half sums
serve formats with a scale for every 16 weights (q6_k).
"""

import numpy as np
from numba import carray, float32, int32

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import byte_array, float_array
from lockstep.runtime.simd import absolute, bf16_bits, maximum, peek, poke, rint, round_bf16, to_i32, where_below
from lockstep.runtime.step import num_rows, word
from lockstep.runtime.targets import bf16_dot

BLOCK, BLOCK_BYTES = 32, 44
SCALE, BIAS, SUMS = 32, 36, 40  # bytes into a block
NATIVE_BF16 = bf16_dot()
ZERO, ONE_127TH, HIGHEST, INFINITY = np.float32(0), np.float32(1 / 127), np.float32(127), np.float32(np.inf)
SMALLEST = np.float32(1e-30)  # a block whose largest value is below this is taken as zero: 127 / amax must stay finite


def q8_width(width):
    """Bytes of a row of quantized activations."""
    return width // BLOCK * BLOCK_BYTES


def bf16_width(width):
    """Bytes of a row of bf16 activations: bf16 where the target multiplies bf16, else the same values as float32."""
    return width * (2 if bf16_dot() else 4)


row_bytes = inlined(q8_width)


@inlined
def magnitude(x):
    """The absolute value; infinity for NaN."""
    return where_below(absolute(x), INFINITY, absolute(x), INFINITY)


@definition
def quantize_block(x, codes):
    """Quantizes 32 float32 to int8 codes; returns the scale and the sums of the first and the last 16 codes.

    Error: half a code, amax / 254. Order: amax exactly; scale = amax * (1 / 127); inverse = 127 / amax;
      code = rint(x * inverse), ties to even; blocks with amax < 1e-30 are all zero. A block with a NaN or an infinity
      has codes of zero and an infinite scale, so that what is multiplied with it is NaN.
    """
    amax = ZERO
    for i in range(BLOCK):
        amax = maximum(magnitude(x[i]), amax)
    if amax == INFINITY:
        codes[:] = np.int8(0)
        return INFINITY, 0, 0
    if amax < SMALLEST:
        codes[:] = np.int8(0)
        return ZERO, 0, 0
    inverse, first, last = HIGHEST / amax, 0, 0
    for i in range(BLOCK):
        code = to_i32(rint(x[i] * inverse))
        codes[i] = np.int8(code)
        if i < BLOCK // 2:
            first += code
        else:
            last += code
    return amax * ONE_127TH, first, last


@definition
def quantize_row(x_K, out):
    """Writes a row of quantized activations at an address, block by block."""
    for b in range(x_K.size // BLOCK):
        place = out + BLOCK_BYTES * b
        scale, first, last = quantize_block(x_K[BLOCK * b : BLOCK * b + BLOCK], carray(byte_array(place), (BLOCK,)))
        poke(place + SCALE, float32(scale))
        poke(place + BIAS, int32(-128 * (first + last)))
        poke(place + SUMS, int32(last * 65536 + (first & 65535)))


@definition
def quantized_row(row, K):
    """Codes and scales of the quantized row at an address."""
    codes, scales = np.empty(K, np.int8), np.empty(K // BLOCK, np.float32)
    for b in range(K // BLOCK):
        place = row + BLOCK_BYTES * b
        codes[BLOCK * b : BLOCK * b + BLOCK] = carray(byte_array(place), (BLOCK,))
        scales[b] = peek(place + SCALE, float32)
    return codes, scales


@kernel
def _quantize(op, step, thread, num_threads):
    K = word(op, 2)
    if thread == 0:
        for t in range(num_rows(op, step)):
            quantize_row(carray(float_array(word(op, 1) + 4 * K * t), (K,)), word(op, 0) + row_bytes(K) * t)


@kernel
def _round(op, step, thread, num_threads):
    K = word(op, 2)
    if thread == 0:
        x = carray(float_array(word(op, 1)), (num_rows(op, step) * K,))
        for i in range(x.size):
            rounded = round_bf16(x[i])
            if NATIVE_BF16:
                poke(word(op, 0) + 2 * i, bf16_bits(rounded))
            else:
                poke(word(op, 0) + 4 * i, rounded)


REFERENCE = {"quantize_q8": Implementation(_quantize), "round_bf16": Implementation(_round)}
