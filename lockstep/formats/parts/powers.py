"""Block scales that are powers of two, stored as one byte (E8M0): e stands for 2^(e - 127).

Codes that are twice a weight's number (of tables of halves) have half of it, 2^(e - 128), as their scale. This is a
denormal for e = 0 and e = 1.
"""

import ml_dtypes
import numpy as np

from lockstep.formats.parts.panels import PANEL
from lockstep.formats.parts.scalars import byte
from lockstep.native.emit import moved, read, vector
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import uint8
from lockstep.native.simd import I8, constant, peek, pow2

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
LARGEST = 252  # the largest e whose products with codes up to 12 are finite; as a number of its own, 255 means NaN
POWERS = np.dtype([("d", "u1", PANEL)])  # a stream of scales: of a panel, for 32 weights of each feature
BITS, SMALLEST = 23, 0x400000  # of a float32's fraction, and the bits of 2^-127


def halves(e: np.ndarray) -> np.ndarray:
    """2^(e - 128) as float32, for E8M0 of any shape. Error: none."""
    number = np.ascontiguousarray(e).view(np.uint8).astype(np.int32)
    return np.ldexp(np.float32(1), number - 128)


def checked_halves(e: np.ndarray) -> np.ndarray:
    """`halves`, with infinity for scales above LARGEST, which whoever packs weights refuses."""
    return np.where(np.ascontiguousarray(e).view(np.uint8) > LARGEST, np.float32(np.inf), halves(e))


def bytes_of(scales: np.ndarray) -> np.ndarray:
    """The bytes e, uint8, of scales 2^(e - 128)."""
    return (np.frexp(scales)[1] + 127).astype(np.uint8)


def power_scales(s, i):
    """The scales of block i, from the stream `POWERS`, as float32, for every panel."""
    b, scales = s.b, []
    start = b.mul(i, s.int(POWERS.itemsize))
    for place, first in zip(s.scales, s.first, strict=True):
        raw = read(b, moved(b, moved(b, place, start), first), vector(I8, s.lanes), s.lanes)
        bits = b.shl(b.zext(raw, s.ints), constant(s.ints, BITS))
        smallest = constant(s.ints, SMALLEST)
        bits = b.select(b.icmp_signed(">", bits, smallest), bits, smallest)
        scales.append(b.fmul(b.bitcast(bits, s.floats), constant(s.floats, 0.5)))
    return scales


@definition
def half_power(row_B, at):
    """2^(e - 128) for the e at a byte of a row."""
    e = byte(row_B, at)
    return pow2(np.float32(e // 2 - 64)) * pow2(np.float32(e - e // 2 - 64))


@inlined
def peek_half_power(address):
    """2^(e - 128) for the e at an address."""
    e = np.int64(peek(address, uint8))
    return pow2(np.float32(e // 2 - 64)) * pow2(np.float32(e - e // 2 - 64))
