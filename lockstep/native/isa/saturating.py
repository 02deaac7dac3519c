"""Loops of a tile of codes where bytes are multiplied to sums of pairs in 16 bits, which saturate: `isa.dots` on AVX2.

Unsigned codes are summed in 16 bits as far as they cannot saturate. Signed ones are multiplied as |w| times a with the
sign of w: at most 2 * 128 * 127 a pair.
"""

from functools import cache, partial
from typing import Any, NamedTuple

from lockstep.native.emit import spread4, vector, words
from lockstep.native.isa import dots as signed_dots
from lockstep.native.isa.dots import each, pinned
from lockstep.native.isa.x86 import maddubs, maddwd, pair_sums
from lockstep.native.simd import I1, I8, call, constant

LESS_NEGATIVE, SIGN_VECTORS = True, 9  # of eight groups, and what is too little


def absolute(b, w):
    return call(b, f"llvm.abs.v{w.type.count}i8", w.type, [w, constant(I1, 0)])


def unsigned_dots(s, i, columns, first, num_groups):
    """`dots.unsigned_dots`."""
    b, sums, dots = s.b, {}, {}
    for g in range(0, 8, 2):
        codes = columns(g)
        for half in (0, 1):
            for r, c in s.cells:
                pairs = maddubs(b, codes[c][half], spread4(b, s.code(r, i, 4 * (g + half)), s.lanes))
                sums[r, c] = b.add(sums[r, c], pairs) if (g + half) % num_groups else pairs
            sums = dict(zip(sums, pinned(s, sums.values()), strict=True))
        if (g + 2) % num_groups == 0:
            wide = {cell: pair_sums(b, v) for cell, v in sums.items()}
            dots = {cell: b.add(dots[cell], v) for cell, v in wide.items()} if dots else wide
    return {(r, c): b.add(v, first[r]) if first else v for (r, c), v in dots.items()}


class Signed(NamedTuple):
    """Codes of block i as tiles of many rows share them, functions of a column and a group: their sizes and their
    signs, -1 or 0 a byte; short: of a column, the sum of the sizes of negative codes; pairs: what this is summed of."""

    size: Any
    sign: Any
    short: Any
    pairs: dict


def unpack_bytes(s, i, pairs, *others):
    """`dots.unpack_bytes`."""
    if not s.shares:
        return signed_dots.unpack_bytes(s, i, pairs, *others)
    own, quads = _signed(s.b, each(pairs)), vector(I8, 4 * s.lanes)
    sizes = lambda c, g: [own.size(c, g + n) for n in (0, 1)]
    signs = [(quads, partial(own.sign, g=g)) for g in range(8)]
    sizes, *rest = s.unpack(i, sizes, *signs, (s.ints, own.short), *others)
    return own._replace(size=each(sizes), sign=lambda c, g: rest[g](c), short=rest[8]), *rest[9:]


def _signed(b, column):
    """The `Signed` of codes at hand."""
    column, pairs = cache(column), {}
    return Signed(
        lambda c, g: absolute(b, column(c, g)),
        lambda c, g: sign(b, column(c, g)),
        lambda c: maddwd(b, pairs[c], constant(pairs[c].type, -1)),
        pairs,
    )


def sign(b, w):
    """-1 in the bytes that are negative, 0 in the others."""
    return b.sext(b.icmp_signed("<", w, constant(w.type, 0)), w.type)


def byte_dots(s, i, column, groups, first):
    """`dots.byte_dots`; there is no `first`, since weights are signed."""
    if isinstance(column, Signed):
        return _byte_dots_read(s, i, column, groups) if s.reads else _byte_dots_of_rows(s, i, column, groups)
    if s.rows > 1:
        return _byte_dots_of_rows(s, i, _signed(s.b, column), groups)
    b, dots = s.b, [constant(s.ints, 0)] * s.cols
    for g in groups:
        a = spread4(b, s.code(0, i, 4 * g), s.lanes)
        for c in range(s.cols):
            w = column(c, g)
            signed = call(b, "llvm.x86.avx2.psign.b", w.type, [a, w])
            dots[c] = b.add(dots[c], pair_sums(b, maddubs(b, absolute(b, w), signed)))
        dots = pinned(s, dots)
    return {(0, c): v for c, v in enumerate(dots)}


def _byte_dots_of_rows(s, i, codes, groups):
    """`byte_dots` with fewer multiplications a row: a xor the sign of w counts a as -a - 1 where w is negative.

    At most 2 * 128 * 128 a pair, and only as -32768. Too little by the sizes of the negative w, the same for all rows.
    """
    b, dots, short = s.b, {}, codes.pairs
    for g in groups:
        for c in range(s.cols):
            size, negative = codes.size(c, g), codes.sign(c, g)
            extra = maddubs(b, size, negative)
            short[c] = b.add(short[c], extra) if c in short else extra
            for r in range(s.rows):
                pairs = _pairs(s, size, negative, s.code(r, i, 4 * g))
                dots[r, c] = b.add(dots[r, c], pairs) if (r, c) in dots else pairs
        values = dict(zip([*dots, *short], pinned(s, [*dots.values(), *short.values()]), strict=True))
        dots = {k: values[k] for k in dots}
        short.update({k: values[k] for k in short})
    return {(r, c): b.add(v, codes.short(c)) for (r, c), v in dots.items()}


def _byte_dots_read(s, i, codes, groups):
    """The same with codes that another tile has unpacked."""
    b, dots = s.b, {(r, c): codes.short(c) for r, c in s.cells}
    for g in groups:
        for c in range(s.cols):
            size, negative = codes.size(c, g), codes.sign(c, g)
            for r in range(s.rows):
                dots[r, c] = b.add(dots[r, c], _pairs(s, size, negative, s.code(r, i, 4 * g)))
        dots = dict(zip(dots, pinned(s, dots.values()), strict=True))
    return dots


def _pairs(s, size, negative, place):
    """Products of the sizes with four codes of a row at a place, xor the signs: int32 lanes."""
    return pair_sums(s.b, maddubs(s.b, size, s.b.xor(spread4(s.b, place, s.lanes), negative)))


def scaled_dots(s, i, codes, scale, pair):
    """`dots.scaled_dots`. Pairs of two groups stay below 4 * 63 * 127 = 32004; PMADDWD multiplies by the scale as it
    widens."""
    b = s.b
    shared = pair[0]()
    totals = [maddwd(b, shared, pair[1](r)) for r in range(s.rows)]
    for half in (0, 1):
        twice = b.or_(b.and_(scale[half], constant(s.ints, 0xFFFF)), b.shl(scale[half], constant(s.ints, 16)))
        for first in (0, 2):
            both = codes(half, first)
            for r in range(s.rows):
                places = [s.code(r, i, 16 * half + 4 * (first + g)) for g in (0, 1)]
                sums = [maddubs(b, code, spread4(b, place, s.lanes)) for code, place in zip(both, places, strict=True)]
                totals[r] = b.add(totals[r], maddwd(b, b.add(*sums), words(b, twice)))
            totals = pinned(s, totals)
    return totals


def long_dots(s, acc, rows, column, x):
    """`dots.long_dots`: |w| * (x xor the sign of w), where -x - 1 stands for -x if w is negative. A pair has from
    -32768 to 32512."""
    b, acc = s.b, dict(acc)
    for g in range(8):
        for c in range(s.cols):
            w = column(c, g)
            negative, size = sign(b, w), absolute(b, w)
            for row in rows:
                acc[*row, c] = b.add(acc[*row, c], _pairs(s, size, negative, x(row, g)))
        acc = dict(zip(acc, pinned(s, acc.values()), strict=True))
    return acc
