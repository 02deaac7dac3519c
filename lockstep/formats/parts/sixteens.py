"""Blocks of 256 weights with an integer scale for every 16: what Q2_K, Q3_K and Q6_K share.

Q2_K and Q3_K have codes of 2 bits (and a third one). Times their scale these fit a byte, so that kernels look up
products of scale and code where others would unpack codes: a lane's four products for the codes 0..3 are its table.
"""

import numpy as np

from lockstep.formats.parts.panels import PANEL
from lockstep.formats.parts.products import ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import byte
from lockstep.native.emit import moved, read, vector, words
from lockstep.native.kernel import definition, inlined
from lockstep.native.lookup import lookup_own
from lockstep.native.simd import I8, bit_and, constant, fma, load_u8, shift_right

TWO_BITS = np.dtype(("u1", (2, PANEL, 4)))  # for 32 k: bits 2 g of byte [half, feature, j]: k = 16 half + 4 g + j
HALF_BYTES = TWO_BITS.itemsize // 2


# ---------------------------------------------------------------- the product without minima


@definition
def dot_q6_k(a_K, a_scale, codes_K, sc, d):
    """sum of a_scale * a[k] * d * sc * code[k], with d for 256 weights, a_scale for 32 and the integer sc for 16.

    Order: acc = fma(float(sc0 * dot0 + sc1 * dot1), d * a_scale, acc) for each block of 32, ascending from +0; the
      integers, dots of the block's first and last 16, are exact and below 2**24.
    """
    acc = ZERO
    for b in range(a_scale.size):
        total = 0
        for k in range(32 * b, 32 * b + 32):
            total += np.int64(sc[k // 16]) * np.int64(a_K[k]) * np.int64(codes_K[k])
        acc = fma(np.float32(total), d[b // 8] * a_scale[b], acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    sc, d = codes_at(w.sc, n, K // 16), floats_at(w.d, n, K // 256)
    return dot_q6_k(x[0], x[1], codes_at(w.codes, n, K), sc, d)


PRODUCT = Product("q6_k", QUANTIZED, ("codes", "sc", "d"), row_dot)


# ---------------------------------------------------------------- codes of two bits


def two_bits(packed: np.ndarray) -> np.ndarray:
    """Blocks uint8 [..., 2, 32], bits 2j and 2j + 1 of whose bytes hold the j-th 32 of 128 weights: [..., 256]."""
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts & 3).reshape(*packed.shape[:-2], 256)


@definition
def two_bit_code(block_B, at, i):
    """The two bits of weight i of a block, whose codes begin at byte `at`."""
    return byte(block_B, at + 32 * (i // 128) + i % 32) >> 2 * (i % 128 // 32) & 3


@inlined
def load_two_bits(address, j):
    """Sixteen codes, the j-th two bits of bytes."""
    return bit_and(shift_right(load_u8(address), 2 * j), 3)


def scaled_codes(s, c, start, g, tables):
    """Entries of the features' tables for the codes of group g of column c, whose `TWO_BITS` begin at start.

    tables: for each half of 32 k, int32 [lanes] with an entry a byte, that of code 0 the lowest.
    """
    half, g = g // 4, g % 4
    bits = s.codes(c, start, half * HALF_BYTES)
    if g:
        bits = s.b.bitcast(s.b.lshr(words(s.b, bits), constant(words(s.b, bits).type, 2 * g)), bits.type)
    return lookup_own(s.b, s.magic, s.target.by_feature(s.b, tables[half], g), bits)


def scales(s, c, start):
    """An unsigned byte of each feature of column c, at start, as int32."""
    place = moved(s.b, moved(s.b, s.w[c], start), s.first[c])
    return s.b.zext(read(s.b, place, vector(I8, s.lanes), s.lanes), s.ints)
