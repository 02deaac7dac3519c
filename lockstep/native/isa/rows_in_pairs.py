"""Loops of a tile of codes, two rows at a time, for SMMLA, which multiplies eight codes of two rows with eight codes of
two features: `isa.dots` with twice the products an instruction.

An operand is eight codes of a feature (or row) beside eight of another. Panels are packed accordingly (`in_pairs`): of
eight features the codes of groups g and g + 1 lie in two vectors, those of the first four features where a column is
asked for group g, those of the last four where it is asked for group g + 1. Loaded as they are, the vectors are
operands of SMMLA, and, for a row without another beside it, of SDOT, whose sums of two groups are added at the end.
"""

from llvmlite import ir

from lockstep.native.emit import cut, join, moved, read, vector
from lockstep.native.isa.aarch64 import sdot
from lockstep.native.isa.dots import unpack_bytes as unpack_bytes
from lockstep.native.isa.dots import with_pair
from lockstep.native.simd import I8, I32, I64, call, constant, splat

LESS_NEGATIVE, SIGN_VECTORS = False, 0
CODES = vector(I8, 16)  # of a register
FEW_ROWS = 4  # whose sums leave registers free


def in_pairs(values):
    """Codes [panels, 16, K], moved so that panels of them hold what is said above.

    Feature 8 n + 4 v + f with k = 8 g + 4 h + j goes to where 8 n + 2 f + h with k = 8 g + 4 v + j was.
    """
    split = values.reshape(values.shape[0], 2, 2, 4, -1, 2, 4)  # panel, n, v, f, g, h, j
    return split.transpose(0, 1, 3, 5, 4, 2, 6).reshape(values.shape)


def by_feature(b, v, g):
    """Of int32 lanes of eight features those that belong to the words of a column's vector of group g."""
    lanes = [4 * (g % 2) + lane // 2 for lane in range(8)]
    return b.shuffle_vector(v, v, ir.Constant(vector(I32, 8), lanes))


def unsigned_dots(s, i, columns, first, num_groups):
    """`dots.unsigned_dots`."""
    place = lambda row, g: s.code(*row, i, 4 * g)
    return _dots(s, [(r,) for r in range(s.rows)], columns, range(0, 8, 2), first, place)


def byte_dots(s, i, column, groups, first):
    """`dots.byte_dots`."""
    place = lambda row, g: s.code(*row, i, 4 * g)
    return _dots(s, [(r,) for r in range(s.rows)], _columns(s, column), groups[::2], first, place)


def scaled_dots(s, i, codes, scale, pair):
    """`dots.scaled_dots`."""
    totals = []
    for half in (0, 1):
        place = lambda row, g, half=half: s.code(*row, i, 16 * half + 4 * g)
        sums = _dots(s, [(r,) for r in range(s.rows)], lambda g, half=half: [codes(half, g)], (0, 2), None, place)
        products = [s.b.mul(sums[r, 0], scale[half]) for r in range(s.rows)]
        totals = [s.b.add(t, v) for t, v in zip(totals, products, strict=True)] if half else products
    return with_pair(s, totals, pair)


def long_dots(s, acc, rows, column, x):
    """`dots.long_dots`."""
    sums = _dots(s, rows, _columns(s, column), range(0, 8, 2), None, x)
    return {cell: s.b.add(v, sums[cell]) for cell, v in acc.items()}


def _columns(s, column):
    return lambda g: [[column(c, g), column(c, g + 1)] for c in range(s.cols)]


def _dots(s, rows, columns, groups, first, place):
    """{(*row, column): int32 lanes}: dots of pairs of rows, and of the last one if their number is odd.

    columns(g): for each column both vectors of groups g and g + 1. place(row, g): where a row's codes of these lie.
    """
    pairs, single = list(zip(rows[::2], rows[1::2], strict=False)), rows[len(rows) // 2 * 2 :]
    start, sums = _starts(s, pairs, single, first), {}
    for g in groups:
        for c, both in enumerate(columns(g)):
            for pair in pairs:
                codes = _two(s.b, [place(row, g) for row in pair], g, len(rows) <= FEW_ROWS)
                _add_pair(s, sums, (pair, c), start[pair], codes, both)
            for row in single:
                _add_row(s, sums, (row, c), start[row], place(row, g), both)
    return _by_row(s, pairs, single, sums)


def _starts(s, pairs, single, first):
    """What the sums of each pair, and of the single row, begin with."""
    if not first:
        zero = constant(vector(I32, 4), 0)
        return dict.fromkeys(pairs, zero) | dict.fromkeys(single, constant(s.ints, 0))
    b, even = s.b, ir.Constant(s.ints, [-1, 0] * (s.lanes // 2))  # neighbours are added at the end
    both = lambda pair: [cut(b, first[r], 0, 4) for (r,) in pair]
    return {pair: _beside(b, *both(pair), half=0) for pair in pairs} | {(r,): b.and_(first[r], even) for (r,) in single}


def _add_pair(s, sums, cell, start, codes, both):
    parts = [cut(s.b, v, n, CODES.count) for v in both for n in (0, CODES.count)]
    for n, part in enumerate(parts):
        sums[*cell, n] = _smmla(s.b, sums.get((*cell, n), start), codes, part)


def _add_row(s, sums, cell, start, place, both):
    codes = s.b.bitcast(splat(s.b, read(s.b, place, I64), vector(I64, s.lanes // 2)), both[0].type)
    for n, v in enumerate(both):
        sums[*cell, n] = sdot(s.b, sums.get((*cell, n), start), v, codes)


def _by_row(s, pairs, single, sums):
    """The sums of `_dots`, in the order of features."""
    b, dots = s.b, {}
    for c in sorted({c for _, c, _ in sums}):
        for pair in pairs:
            for half, row in enumerate(pair):
                parts = [_beside(b, sums[pair, c, n], sums[pair, c, n + 1], half) for n in (0, 2)]
                dots[*row, c] = join(b, *parts)
        for row in single:
            dots[*row, c] = join(b, *(_neighbours(b, sums[row, c, n]) for n in (0, 1)))
    return dots


def _smmla(b, acc, rows, w):
    """acc, lanes of (row, feature): (0, 0), (0, 1), (1, 0), (1, 1)."""
    return call(b, "llvm.aarch64.neon.smmla.v4i32.v16i8", acc.type, [acc, rows, w])


def _two(b, places, g, sixteen):
    """Eight codes of groups g and g + 1 at one place beside those at another. sixteen: whether those of four groups are
    loaded at once, which takes fewer instructions and more registers."""
    wide = vector(I64, 2)
    if sixteen:
        upper = g // 2 % 2
        both = [read(b, moved(b, place, -8 * upper), wide) for place in places]
        return b.bitcast(b.shuffle_vector(*both, ir.Constant(vector(I32, 2), [upper, 2 + upper])), CODES)
    both = ir.Constant(wide, ir.Undefined)
    for n, place in enumerate(places):
        both = b.insert_element(both, read(b, place, I64), ir.Constant(I32, n))
    return b.bitcast(both, CODES)


def _beside(b, x, y, half):
    """The lower (0) or upper (1) two lanes of x, then those of y."""
    lanes = [2 * half, 2 * half + 1, 4 + 2 * half, 5 + 2 * half]
    return b.shuffle_vector(x, y, ir.Constant(vector(I32, 4), lanes))


def _neighbours(b, v):
    """Sums of every two neighbouring lanes of eight."""
    halves = [cut(b, v, 0, 4), cut(b, v, 4, 4)]
    return call(b, "llvm.aarch64.neon.addp.v4i32", halves[0].type, halves)
