"""Numbers at byte `at` of a row as a checkpoint stores it: for definitions, which decode one weight at a time."""

import numpy as np

from lockstep.native.kernel import definition
from lockstep.native.simd import pow2

SMALLEST_F16 = np.float32(2.0**-24)


@definition
def byte(row_B, at):
    """An unsigned byte."""
    return np.int64(row_B[at]) & 255


@definition
def nibble(row_B, at, high):
    """Low or high four bits of a byte."""
    return byte(row_B, at) >> 4 * high & 15


@definition
def low_bits(row_B, at, i):
    """The low four bits of weight i of a block of 32, whose 16 bytes of nibbles start at byte `at`."""
    return nibble(row_B, at + i % 16, i % 32 // 16)


@definition
def upper_half(row_B, at):
    """Two bytes as the upper half of 32 bits."""
    return byte(row_B, at) << 16 | byte(row_B, at + 1) << 24


@definition
def single(row_B, at):
    """The float32 at a byte."""
    return np.uint32(byte(row_B, at) | byte(row_B, at + 1) << 8 | upper_half(row_B, at + 2)).view(np.float32)


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
