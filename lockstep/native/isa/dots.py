"""Loops of a tile of codes on targets with an instruction for dots of four bytes, or with general instructions for one.

`s` is the `Site` of the tile (formats/parts/tiles.py), `i` the number of a block of 32 values of K, which is eight
groups of four. A column's codes of a group are bytes, four for each feature; rows have the same four bytes for all.
The modules that targets name as their `tiles` have the five functions that are not helpers, and the constants

    LESS_NEGATIVE   whether what `long_dots` adds is short by the sum of a feature's negative weights
    SIGN_VECTORS    how many vectors more than their codes signed bytes are unpacked to, see `unpack_bytes`
"""

from lockstep.native.emit import spread4
from lockstep.native.simd import constant

LESS_NEGATIVE, SIGN_VECTORS = False, 0


def quad(s, place, g):
    """Four codes at a place, those of group g, in the lanes of every feature."""
    return spread4(s.b, place, s.lanes)


def pinned(s, values):
    """The same vectors behind a barrier: LLVM neither reorders their computation nor moves loads across the barrier.

    Without it LLVM turns chains of integer additions into trees and hoists their loads, which spills registers.
    """
    clobber, result = ",~{memory}", []
    for v in values:
        result.append(s.target.machine.barrier(s.b, v, clobber))
        clobber = ""
    return result


def unsigned_dots(s, i, columns, first, num_groups):
    """Dots of block i with unsigned codes, on top of first[row] (or of zero): {(row, column): int32 lanes}.

    columns(g): for each column the codes of groups g and g + 1. num_groups: how many groups may be summed in 16 bits,
    where a group adds at most 2 * (largest code) * 127.
    """
    b, dot = s.b, s.target.dot
    dots = {(r, c): first[r] if first else constant(s.ints, 0) for r, c in s.cells}
    for g in range(0, 8, 2):
        codes = columns(g)
        for half in (0, 1):
            for r in range(s.rows):
                a = s.target.quad(s, s.code(r, i, 4 * (g + half)), g + half)
                for c in range(s.cols):
                    dots[r, c] = dot(b, dots[r, c], codes[c][half], a)
    return dots


def each(pairs):
    """A function of a column and a group that makes its codes, from `pairs`, which makes those of two groups."""
    return lambda c, g: pairs(c, g - g % 2)[g % 2]


def unpack_bytes(s, i, pairs, *others):
    """`Site.unpack` for codes of 8 bits: the columns that `byte_dots` takes, and the functions that make others."""
    pairs, *others = s.unpack(i, pairs, *others)
    return each(pairs), *others


def byte_dots(s, i, column, groups, first):
    """Dots of some groups of block i with codes of 8 bits, on top of first[row] (or of zero).

    column(c, g): the codes of group g in column c, signed, plus 128 where the target's dot takes unsigned weights; or
    what `unpack_bytes` made of them.
    """
    b, dot = s.b, s.target.dot
    dots = {(r, c): first[r] if first else constant(s.ints, 0) for r, c in s.cells}
    for g in groups:
        columns = [column(c, g) for c in range(s.cols)]
        for r in range(s.rows):
            a = s.target.quad(s, s.code(r, i, 4 * g), g)
            for c in range(s.cols):
                dots[r, c] = dot(b, dots[r, c], columns[c], a)
    return dots


def scaled_dots(s, i, codes, scale, pair):
    """scale[0] * (dot of the first 16) + scale[1] * (dot of the last 16) + pair[0] . pair[1] of each row of one column,
    with codes of 0..63: [int32 lanes].

    codes(half, g): the codes of groups g and g + 1 of a half. scale: int32 lanes, each of which is an int8. pair: int16
    lanes, as functions: of nothing, and of a row's number.
    """
    b, dot, totals = s.b, s.target.dot, [None] * s.rows
    for half in (0, 1):
        dots = [constant(s.ints, 0)] * s.rows
        for first in (0, 2):
            both = codes(half, first)
            for r in range(s.rows):
                for g in (0, 1):
                    a = s.target.quad(s, s.code(r, i, 16 * half + 4 * (first + g)), first + g)
                    dots[r] = dot(b, dots[r], both[g], a)
        products = [b.mul(v, scale[half]) for v in dots]
        totals = pinned(s, [b.add(t, v) for t, v in zip(totals, products, strict=True)] if half else products)
    return with_pair(s, totals, pair)


def with_pair(s, totals, pair):
    """The totals of rows plus pair[0] . pair[1], as `scaled_dots` has them."""
    shared = pair[0]()
    sums = [pair[1](r) for r in range(s.rows)]
    return [s.target.pair_dot(s.b, total, shared, own) for total, own in zip(totals, sums, strict=True)]


def long_dots(s, acc, rows, column, x):
    """acc[*row, c] + x(row, g) . column(c, g) over the eight groups of a block, for sums over all of K.

    rows: tuples that name them. column: as in `byte_dots`. x(row, g): where a row's codes of group g lie.
    """
    b, acc = s.b, dict(acc)
    for g in range(8):
        columns = [column(c, g) for c in range(s.cols)]
        for row in rows:
            codes = s.target.quad(s, x(row, g), g)
            for c in range(s.cols):
                acc[*row, c] = s.target.dot(b, acc[*row, c], columns[c], codes)
    return acc
