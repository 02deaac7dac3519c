"""Codes of 5 bits, stored as fifth bits and low ones: what Q5_0, Q5_1 and Q5_K share."""

import numpy as np

from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import GROUP_BYTES, LOW_BITS, Codes, nibbles
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import PANEL, Placed, fifth_bits, nibble_pairs
from lockstep.formats.parts.scalars import byte, low_bits
from lockstep.native.emit import words
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import int32
from lockstep.native.simd import bit_and, constant, lane_numbers, load_u8, peek, shift_right

FIVE_BITS = np.dtype([("fifth", "u1", (PANEL, 4)), ("low", LOW_BITS)])  # of a panel, for 32 k
SIXTEEN = np.int32(16)


def codes_of(blocks: np.ndarray) -> np.ndarray:
    """Codes 0..31 of blocks of 32, uint8 [..., 32]: bit i of the four bytes of fifth bits belongs to code i."""
    return blk.nibbles(blocks["low"]) | np.unpackbits(blocks["fifth"], axis=-1, bitorder="little") << 4


def placed(codes: np.ndarray) -> Placed:
    """Codes in a panel: bit g of a feature's byte j of fifth bits belongs to the code of k = 4 g + j."""
    return {"codes.fifth": (fifth_bits, codes >> 4), "codes.low": (nibble_pairs, codes & 15)}


def _codes_at(s, start):
    """Fifth bits, then the low ones: byte j of a feature's four has in bit g the fifth bit of code 4 g + j."""
    b, fifths = s.b, [s.codes(c, start, 0) for c in range(s.cols)]

    def pair(c, g):
        low = nibbles(b, s.target, s.codes(c, start, offset(FIVE_BITS, "low") + GROUP_BYTES * g // 2))
        return [b.or_(v, fifth_bit(b, fifths[c], g + half)) for half, v in enumerate(low)]

    return pair


U5 = Codes(_codes_at, 4)  # sums of pairs stay below 4 * 2 * 31 * 127 = 31496 over half a block


def fifth_bit(b, v, g):
    """Bit g of every byte, moved to bit 4."""
    bits = words(b, v)
    if g != 4:
        bits = (b.shl if g < 4 else b.lshr)(bits, constant(bits.type, abs(4 - g)))
    return b.and_(b.bitcast(bits, v.type), constant(v.type, 16))


@definition
def code(row_B, fifth, low, i):
    """The code of weight i of a block of 32; fifth, low: the bytes at which its fifth and its low bits begin."""
    return low_bits(row_B, low, i) | (byte(row_B, fifth + i % 32 // 8) >> i % 8 & 1) << 4


@inlined
def loaded_codes(fifth, low):
    """The first and the last 16 codes of a block of 32, from the addresses of its fifth and its low bits."""
    bits, nibble = peek(fifth, int32), load_u8(low)
    first, last = shift_right(bits, lane_numbers()), shift_right(bits, lane_numbers() + SIXTEEN)
    return bit_and(nibble, 15) + bit_and(first, 1) * SIXTEEN, shift_right(nibble, 4) + bit_and(last, 1) * SIXTEEN
