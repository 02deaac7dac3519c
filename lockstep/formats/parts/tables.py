"""Codes of 4 bits that stand for entries of a table of sixteen integers: what formats with such tables share.

A table is int8 [16]. A panel holds the codes (`LOW_BITS`); a kernel looks up their entries, which it multiplies as
codes of 8 bits. Features that fill up a panel have codes of 0 and scales of zero bytes: one of both must mean zero.
"""

import numpy as np

from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import (
    GROUP_BYTES,
    byte_dots,
    nibbles,
    unpack_bytes,
    unsigned_dots,
    zero_points,
)
from lockstep.formats.parts.scalars import low_bits
from lockstep.native.kernel import definition, inlined
from lockstep.native.lookup import lookup, lookup_i8, table_of, words_of
from lockstep.native.simd import bit_and, constant, load_u8, shift_right

# the table of GGML's IQ4 formats: its steps grow with the magnitude
NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
NONLINEAR_WORDS = words_of(NONLINEAR)
# twice the floats with two bits of exponent and one of fraction
TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
TWICE_E2M1_WORDS = words_of(TWICE_E2M1)


def entries(packed: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Blocks of 32 codes, uint8 [..., 16], as entries, int8 [..., 32]: those of the low nibbles first."""
    return table[blk.nibbles(packed)]


def entry_dots(s, i, start, table):
    """Dots of block i with the entries of codes that begin `start` bytes into the panels.

    Where sums of pairs saturate in 16 bits, small entries are made unsigned, so that four groups are summed there: in a
    group they add at most twice the largest code, which is 127, times the largest entry.
    """
    zero = -int(table.min())
    if not s.target.tiles.SIGN_VECTORS or 4 * 2 * 127 * (int(table.max()) + zero) > np.iinfo(np.int16).max:
        [column] = unpack_bytes(s, i, entries_at(s, start, table))
        return byte_dots(s, i, column)
    [pairs] = s.unpack(i, entries_at(s, start, table, zero))
    first = [s.b.mul(v, constant(s.ints, zero)) for v in zero_points(s, i, 7)]
    return unsigned_dots(s, i, pairs, first, 4)


def entries_at(s, start, table, more=0):
    """A function that makes the entries of a column's groups g and g + 1, whose codes begin `start` bytes into the
    panels, from the column and an even g. more: what is added to each."""
    constant_table = table_of(table.astype(np.int16) + (128 if s.target.unsigned else more))

    def pair(c, g):
        codes = nibbles(s.b, s.target, s.codes(c, start, GROUP_BYTES * g // 2))
        return [lookup(s.b, s.magic, constant_table, v) for v in codes]

    return pair


@definition
def nonlinear(row_B, at, i):
    """The entry of weight i of a block of 32 whose codes start at byte `at`."""
    return np.float32(NONLINEAR[low_bits(row_B, at, i)])


@definition
def twice_e2m1(row_B, at, i):
    """The same in the table `TWICE_E2M1`."""
    return np.float32(TWICE_E2M1[low_bits(row_B, at, i)])


@inlined
def load_entries(address, words) -> tuple:
    """The first and the last 16 entries of a block of 32, from the address of its codes; words: the table's."""
    codes = load_u8(address)
    low, high = words
    return lookup_i8(bit_and(codes, 15), low, high), lookup_i8(shift_right(codes, 4), low, high)
