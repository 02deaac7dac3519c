"""Linear tiles of codes: exact integer dots over blocks of 32, then the block's scales.

The target decides which instructions make the dots (`native.isa`). The integers are exact, so all instructions give
the same bits; the float32 steps that follow are those of the definitions in `products.py`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lockstep.formats.format import SCALES
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import PANEL
from lockstep.formats.parts.rows import BLOCK
from lockstep.native.emit import fma, halves_f32, moved, spread, words
from lockstep.native.simd import F32, I32, constant

# for 32 k: byte [n, feature, j] holds the codes of k = 8 n + j (low nibble) and of k = 8 n + 4 + j (high nibble)
LOW_BITS = np.dtype(("u1", (4, PANEL, 4)))
GROUP_BYTES = 4 * PANEL  # four codes of 8 bits, or eight of 4, of each feature


# ---------------------------------------------------------------- scales


def w_scales(s, i):
    """The weights' float16 scales of block i, from the stream `SCALES`, as float32, for every panel."""
    start = s.b.mul(i, s.int(SCALES.itemsize))
    places = [moved(s.b, moved(s.b, place, start), 2 * first) for place, first in zip(s.scales, s.first, strict=True)]
    return [halves_f32(s.b, place, s.lanes) for place in places]


def scale_add(s, acc, dots, scales, i):
    """acc = fma(float(dots), scales * a_scale, acc), cell by cell."""
    b = s.b
    rows = [spread(b, s.a_scale(r, i), F32, s.lanes) for r in range(s.rows)]
    return {(r, c): fma(b, b.sitofp(dots[r, c], s.floats), b.fmul(scales[c], rows[r]), acc[r, c]) for r, c in s.cells}


def zero_points(s, i, shift):
    """The correction for the zero point of unsigned codes, for every row: bias >> shift in all lanes."""
    biases = [spread(s.b, s.bias(r, i), I32, s.lanes) for r in range(s.rows)]
    return [s.b.ashr(v, constant(s.ints, shift)) if shift else v for v in biases]


def feature_half(s, c, start, begin):
    """A float16 for each feature of column c, at start + begin of its panel, as float32."""
    return halves_f32(s.b, moved(s.b, moved(s.b, s.w[c], start), begin + 2 * s.first[c]), s.lanes)


def minimum_add(s, acc, minima, i):
    """acc = fma(minima, float(bias) * a_scale, acc), cell by cell; rows have the product."""
    rows = [spread(s.b, s.scaled_bias(r, i), F32, s.lanes) for r in range(s.rows)]
    return {(r, c): fma(s.b, minima[c], rows[r], acc[r, c]) for r, c in s.cells}


# ---------------------------------------------------------------- codes of 4 bits and more


def nibbles(b, target, v):
    """Two groups of codes 0..15 from bytes: the low halves, then the high ones."""
    if target.shifts_bytes:
        return b.and_(v, constant(v.type, 15)), b.lshr(v, constant(v.type, 4))
    high = b.bitcast(b.lshr(words(b, v), constant(words(b, v).type, 4)), v.type)
    return b.and_(v, constant(v.type, 15)), b.and_(high, constant(v.type, 15))


class Codes(NamedTuple):
    """Unsigned codes in panels. at: (site, bytes into the panels) to a function that makes those of a column's groups g
    and g + 1, from c and an even g. num_groups: how many groups AVX2 may sum in 16 bits, see `isa.dots`."""

    at: Callable[..., Callable[..., Sequence]]
    num_groups: int


def _low_bits(s, start):
    return lambda c, g: nibbles(s.b, s.target, s.codes(c, start, GROUP_BYTES * g // 2))


U4 = Codes(_low_bits, 8)  # sums of pairs stay below 8 * 2 * 15 * 127 = 30480 over a whole block


def with_zero_points(s, panel, codes, shift):
    """acc = fma(float(dot), w_scale * a_scale, acc), with scales in a stream of their own.

    The dots of unsigned codes are on top of the correction bias >> shift: bias is -128 * (sum of the activations), so
    that the zero point of the codes is 128 >> shift.
    """

    def block(i, acc):
        [pairs] = s.unpack(i, codes.at(s, s.b.mul(i, s.int(panel.itemsize))))
        dots = unsigned_dots(s, i, pairs, zero_points(s, i, shift), codes.num_groups)
        return scale_add(s, acc, dots, w_scales(s, i), i)

    return s.blocks(BLOCK, block, panel.itemsize, SCALES.itemsize)


def with_minima(s, panel, codes):
    """acc = fma(-m / 128, float(bias) * a_scale, fma(float(dot), d * a_scale, acc))."""
    b = s.b

    def block(i, acc):
        start = b.mul(i, s.int(panel.itemsize))
        d = lambda c: feature_half(s, c, start, offset(panel, "d"))
        m = lambda c: b.fmul(feature_half(s, c, start, offset(panel, "m")), constant(s.floats, -(2.0**-7)))
        pairs = codes.at(s, b.add(start, s.int(offset(panel, "codes"))))
        return affine_add(s, i, acc, codes.num_groups, pairs, d, m)

    return s.blocks(BLOCK, block, panel.itemsize)


def affine_add(s, i, acc, num_groups, pairs, d, m):
    """acc = fma(m, float(bias) * a_scale, fma(float(dot), d * a_scale, acc)), cell by cell.

    pairs: see `Codes.at`; d, m: functions of a column.
    """
    pairs, d, m = s.unpack(i, pairs, (s.floats, d), (s.floats, m))
    dots, columns = unsigned_dots(s, i, pairs, None, num_groups), range(s.cols)
    acc = scale_add(s, acc, dots, [d(c) for c in columns], i)
    return minimum_add(s, acc, [m(c) for c in columns], i)


def unsigned_dots(s, i, pairs, first, num_groups):
    """Dots of block i with unsigned codes, on top of first[row] (or of zero); pairs, num_groups: see `Codes`."""
    columns = lambda g: [pairs(c, g) for c in range(s.cols)]
    return s.target.tiles.unsigned_dots(s, i, columns, first, num_groups)


# ---------------------------------------------------------------- codes of 8 bits


def unpack_bytes(s, i, pairs, *others):
    """`Site.unpack` for codes of 8 bits: the columns that `byte_dots` takes, and the functions that make others."""
    return s.target.tiles.unpack_bytes(s, i, pairs, *others)


def stored_bytes(s, i, column):
    """The same for codes that panels hold as they are: tiles share them where the target splits them (SIGN_VECTORS)."""
    if not s.shares:
        return column
    [columns] = unpack_bytes(s, i, lambda c, g: [column(c, g + n) for n in (0, 1)])
    return columns


def byte_dots(s, i, column):
    """Dots of block i with codes of 8 bits.

    column(c, g): the codes of group g in column c: signed, plus 128 where the target's dot takes unsigned weights; or
    what `unpack_bytes` returns.
    """
    first = zero_points(s, i, 0) if s.target.unsigned else None
    return s.target.tiles.byte_dots(s, i, column, range(8), first)


def half_dots(s, i, column):
    """`byte_dots` of the first and of the last 16 of block i."""
    parts = [range(4 * half, 4 * half + 4) for half in (0, 1)]
    first = _half_zero_points(s, i) if s.target.unsigned else (None, None)
    return [s.target.tiles.byte_dots(s, i, column, *pair) for pair in zip(parts, first, strict=True)]


def _half_zero_points(s, i):
    """-128 times the sums of the first and of the last 16 codes of every row, in all lanes."""
    b, number = s.b, lambda value: constant(s.ints, value)
    both = [spread(b, s.sums(r, i), I32, s.lanes) for r in range(s.rows)]
    upper = [b.shl(v, number(16)) for v in both], [b.and_(v, number(-(1 << 16))) for v in both]
    return [[b.neg(b.ashr(v, number(9))) for v in half] for half in upper]
