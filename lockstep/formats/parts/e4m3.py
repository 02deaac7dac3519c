"""Block scales of 8 bits without a sign (E4M3): four bits of exponent, three of fraction, 2^-9 to 448.

Codes that are twice a weight's number have half of it as their scale, which is exact in float32. Bytes that have a sign
or mean NaN are no scales.
"""

import ml_dtypes
import numpy as np

from lockstep.formats.parts.scalars import byte
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import uint8
from lockstep.native.simd import peek, pow2

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 0x7E  # the byte of 448


def halves(scales: np.ndarray) -> np.ndarray:
    """Half of each E4M3, as float32. Error: none."""
    return np.ascontiguousarray(scales).astype(np.float32) * np.float32(0.5)


def checked_halves(scales: np.ndarray) -> np.ndarray:
    """`halves`, with infinity for bytes that are no scales, which whoever packs weights refuses."""
    number = np.ascontiguousarray(scales).view(np.uint8)
    return np.where(number > LARGEST, np.float32(np.inf), halves(scales))


@inlined
def half_of(number):
    """Half of the scale whose byte is a number 0..126."""
    exponent, fraction = number >> 3, number & 7
    return np.float32(fraction + 8 * min(exponent, 1)) * pow2(np.float32(max(exponent, 1) - 11))


@definition
def half_e4m3(row_B, at):
    """Half of the scale at a byte of a row."""
    return half_of(byte(row_B, at))


@inlined
def peek_half_e4m3(address):
    """Half of the scale at an address."""
    return half_of(np.int64(peek(address, uint8)))
