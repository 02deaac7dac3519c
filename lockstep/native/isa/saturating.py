"""Loops of a tile of codes where bytes are multiplied to sums of pairs in 16 bits, which saturate: `isa.dots` on AVX2.

Unsigned codes are summed in 16 bits as far as they cannot saturate. Signed ones are multiplied as |w| times a with the
sign of w: at most 2 * 128 * 127 a pair.
"""

from lockstep.native.emit import spread4, words
from lockstep.native.isa.dots import pinned
from lockstep.native.isa.x86 import maddubs, maddwd, pair_sums
from lockstep.native.simd import I1, call, constant

LESS_NEGATIVE = True


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


def byte_dots(s, i, column, groups, first):
    """`dots.byte_dots`; there is no `first`, since weights are signed."""
    if s.rows > 1:
        return _byte_dots_of_rows(s, i, column, groups)
    b, dots = s.b, [constant(s.ints, 0)] * s.cols
    for g in groups:
        a = spread4(b, s.code(0, i, 4 * g), s.lanes)
        for c in range(s.cols):
            w = column(c, g)
            signed = call(b, "llvm.x86.avx2.psign.b", w.type, [a, w])
            dots[c] = b.add(dots[c], pair_sums(b, maddubs(b, absolute(b, w), signed)))
        dots = pinned(s, dots)
    return {(0, c): v for c, v in enumerate(dots)}


def _byte_dots_of_rows(s, i, column, groups):
    """`byte_dots` with fewer multiplications a row: a xor the sign of w counts a as -a - 1 where w is negative.

    At most 2 * 128 * 128 a pair, and only as -32768. The excess is the sum of the negative w, the same for all rows.
    """
    b, dots, excess = s.b, {}, {}
    for g in groups:
        for c in range(s.cols):
            w = column(c, g)
            sign, size = b.sext(b.icmp_signed("<", w, constant(w.type, 0)), w.type), absolute(b, w)
            extra = maddubs(b, size, sign)
            excess[c] = b.add(excess[c], extra) if c in excess else extra
            for r in range(s.rows):
                pairs = pair_sums(b, maddubs(b, size, b.xor(spread4(b, s.code(r, i, 4 * g), s.lanes), sign)))
                dots[r, c] = b.add(dots[r, c], pairs) if (r, c) in dots else pairs
        values = dict(zip([*dots, *excess], pinned(s, [*dots.values(), *excess.values()]), strict=True))
        dots, excess = {k: values[k] for k in dots}, {k: values[k] for k in excess}
    excess = {c: pair_sums(b, v) for c, v in excess.items()}
    return {(r, c): b.sub(v, excess[c]) for (r, c), v in dots.items()}


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
            sign, size = b.sext(b.icmp_signed("<", w, constant(w.type, 0)), w.type), absolute(b, w)
            for row in rows:
                codes = b.xor(spread4(b, x(row, g), s.lanes), sign)
                acc[*row, c] = b.add(acc[*row, c], pair_sums(b, maddubs(b, size, codes)))
        acc = dict(zip(acc, pinned(s, acc.values()), strict=True))
    return acc
