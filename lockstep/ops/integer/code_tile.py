"""Linear tiles of integer codes: exact sums of products over all of K in int32, scaled once at the end.

A row of x is one plane of int8 codes or two, and a tail (see ops/integer/code_rows.py); weights are panels of int8
codes and the words of their features (see ops/integer/code_weights.py). Two planes are two rows to the loop over K.
The target says which instruction multiplies; all give the same integers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lockstep.formats.parts.tiles import Site, fields, finish, look_ahead
from lockstep.native import targets
from lockstep.native.emit import ir, moved, pointer, read, spread, vector
from lockstep.native.numbers import types
from lockstep.native.simd import F32, I32, I64, LANES, constant, primitive, splat

BLOCK, PANEL_BYTES = 32, 512  # values of K in a turn of the loop, and their bytes in a panel
GROUP_BYTES = 64  # of four values of K
NARROW_SUMS = 6  # accumulators that fit into registers of eight lanes
F64 = ir.DoubleType()


class CodeTile(NamedTuple):
    """What a tile multiplies, whatever its height: planes of x, columns of w by panel; and an entry of SCALINGS."""

    planes: int
    panels: range
    scaling: Callable[..., dict[tuple[int, int], Any]]


class CodeSite(Site):
    """A `Site` whose cells are (row, plane, column), with int32 sums that start as the weights' words say."""

    def __init__(self, b, magic, height, columns, lanes, x, w, *, planes):
        super().__init__(b, magic, height, columns, lanes, x, w)
        self.planes = range(planes)
        self.cells = [(r, p, c) for r in range(self.rows) for p in self.planes for c in range(self.cols)]
        first = lambda c: self.word(c, 3, I32) if self.target.tiles.LESS_NEGATIVE else constant(self.ints, 0)
        firsts = [first(c) for c in range(self.cols)]
        self.start = {cell: firsts[cell[2]] for cell in self.cells}

    def places(self):
        """(row, column) of every value of the tile."""
        return [(r, c) for r in range(self.rows) for c in range(self.cols)]

    def x_codes(self, r, plane, k):
        """Where the codes of a plane of row r from k on lie."""
        return moved(self.b, moved(self.b, self.x[r], k), self.b.mul(self.K, self.int(plane)))

    def word(self, c, index, element):
        """One of the four words of each feature of column c."""
        return read(
            self.b, moved(self.b, self.scales[c], 64 * index + 4 * self.first[c]), vector(element, self.lanes), 4
        )

    def tail(self, r, index, element):
        """One of the words of row r's tail, the same for each feature."""
        place = moved(self.b, self.x[r], self.b.mul(self.K, self.int(2)))
        return spread(self.b, moved(self.b, place, 4 * index), element, self.lanes)


def sums(s):
    """Exact sums of products of all planes with all columns. Where the target's weights are unsigned, their codes and
    zeros have 128 added."""
    b, rows = s.b, [(r, p) for r in range(s.rows) for p in s.planes]

    def step(i, acc):
        start, k = b.mul(i, s.int(PANEL_BYTES)), b.mul(i, s.int(BLOCK))
        column = lambda c, g: s.codes(c, start, GROUP_BYTES * g)
        x = lambda row, g: s.x_codes(*row, b.add(k, s.int(4 * g)))
        return s.target.tiles.long_dots(s, acc, rows, column, x)

    return s.blocks(BLOCK, step, PANEL_BYTES)


def scaled(s, acc, grid):
    """float32(float64(exact) * (float64(row's scale) * float64(feature's scale))) for each row and column."""
    b, values = s.b, {}
    for r, c in s.places():
        values[r, c] = b.fptrunc(b.fmul(exact(s, acc, r, c), scale(s, r, c)), s.floats)
    return values


def requantized(s, acc, grid):
    """Values on the grid at an address, by the steps and with the constants of `code_fixed.fixed_value`."""
    b, values, longs = s.b, {}, vector(I64, s.lanes)
    word = lambda n: splat(b, read(b, moved(b, pointer(b, grid), 4 * n), F32, 4), s.floats)
    kind, y_scale, zero, low, high = (word(n) for n in (0, 1, 3, 4, 5))
    integer = b.fcmp_ordered("==", kind, constant(s.floats, 1.0))
    for r, c in s.places():
        m = b.fdiv(scale(s, r, c), b.fpext(y_scale, vector(F64, s.lanes)))
        is_known = b.and_(integer, b.fcmp_ordered("ord", m, m))
        rounded = b.sitofp(_fixed(b, b.fptosi(exact(s, acc, r, c), longs), m), s.floats)
        code = _clamped(b, b.fadd(zero, rounded), low, high)
        value = b.fmul(b.fsub(code, zero), y_scale)
        values[r, c] = b.select(is_known, value, constant(s.floats, float("nan")))
    return values


def _fixed(b, acc, m):
    """`code_fixed.requantized` of int64 sums acc and float64 multipliers m."""
    of = lambda n: constant(acc.type, n)
    bits = b.bitcast(m, acc.type)
    shift = b.sub(of(31 + 1022), b.and_(b.lshr(bits, of(52)), of(2047)))
    unit = b.bitcast(b.or_(b.and_(bits, of((1 << 52) - 1)), of(1022 << 52)), m.type)  # 0.5 <= unit < 1
    M = b.fptosi(b.fadd(b.fmul(unit, constant(m.type, 2.0**31)), constant(m.type, 0.5)), acc.type)
    negative = b.icmp_signed("<", acc, of(0))
    size = b.select(negative, b.sub(of(0), acc), acc)
    large = b.icmp_signed("<", shift, of(17))
    large_product = b.mul(_least(b, size, of(1 << 18)), M)
    upper = b.mul(size, b.lshr(M, of(16)))
    product = b.add(upper, b.lshr(b.mul(size, b.and_(M, of(65535))), of(16)))
    product = b.select(large, large_product, product)
    right = b.select(large, shift, b.sub(shift, of(16)))
    right = _least(b, b.select(b.icmp_signed("<", right, of(1)), of(1), right), of(62))
    rounded = b.lshr(b.add(product, b.shl(of(1), b.sub(right, of(1)))), right)
    rounded = _least(b, rounded, of(1 << 20))
    return b.select(negative, b.sub(of(0), rounded), rounded)


def _least(b, x, y):
    return b.select(b.icmp_signed("<", x, y), x, y)


def _clamped(b, x, low, high):
    x = b.select(b.fcmp_ordered("<", x, high), x, high)
    return b.select(b.fcmp_ordered(">", x, low), x, low)


def scale(s, r, c):
    """float64(row's scale) * float64(feature's scale), exactly."""
    b, doubles = s.b, vector(F64, s.lanes)
    return b.fmul(b.fpext(s.tail(r, 0, F32), doubles), b.fpext(s.word(c, 0, F32), doubles))


def exact(s, acc, r, c):
    """The sum of products of a row's and a column's codes less their zero points, in float64, which holds it exactly.

    It is acc - zero of w * sum of the row - zero of the row * sum of (w - zero). With one plane the result is below
    2**31, so that int32 may wrap on the way; with two planes acc is 256 * first + second.
    """
    return (_exact_of_one if len(s.planes) == 1 else _exact_of_two)(s, acc, r, c)


def _exact_of_one(s, acc, r, c):
    b = s.b
    both = b.add(b.mul(s.word(c, 1, I32), s.tail(r, 2, I32)), b.mul(s.tail(r, 1, I32), s.word(c, 2, I32)))
    return b.sitofp(b.sub(acc[r, 0, c], both), vector(F64, s.lanes))


def _exact_of_two(s, acc, r, c):
    b, double = s.b, lambda v: s.b.sitofp(v, vector(F64, s.lanes))
    first, second = double(acc[r, 0, c]), double(acc[r, 1, c])
    products = b.fadd(b.fmul(first, constant(first.type, 256.0)), second)
    of_zero = b.fmul(double(s.word(c, 1, I32)), double(s.tail(r, 2, I32)))
    of_row = b.fmul(double(s.tail(r, 1, I32)), double(s.word(c, 2, I32)))
    return b.fsub(products, b.fadd(of_zero, of_row))


SCALINGS = {"float": scaled, "fixed": requantized}


@primitive()
def code_tile(context, shape, num_rows, x, w, out, ahead, grid):
    """out = x W^T (+ residual) for num_rows rows by some panels, over all of K.

    shape: literals: planes, 1 or 2; (fewest, most) rows; number of panels; a key of SCALINGS. x: `tiles.Rows` of codes.
    w: `tiles.Panels`, K that of a plane. out: `tiles.Output`. ahead: `tiles.Ahead`. grid: the address of the output's
    grid, if it has one.
    """
    planes, rows, panels, scaling = shape
    fewest, most = (n.literal_value for n in rows)
    tile = CodeTile(planes.literal_value, range(panels.literal_value), SCALINGS[scaling.literal_value])

    def codegen(ctx, b, sig, args):
        magic = ctx.codegen().magic_tuple()
        operands = [fields(b, *pair) for pair in zip(sig.args[2:6], args[2:6], strict=True)]
        choice = b.switch(args[1], end := b.append_basic_block("no_rows"))
        for height in range(fewest, most + 1):
            choice.add_case(ir.Constant(I64, height), block := b.append_basic_block(f"rows_{height}"))
            b.position_at_start(block)
            _emit_tile(b, magic, tile, height, operands, args[6])
            b.branch(end)
        b.position_at_start(end)
        return ctx.get_dummy_value()

    return types.void(shape, types.int64, x, w, out, ahead, types.int64), codegen


def _emit_tile(b, magic, tile, height, operands, grid):
    """A tile of `height` rows: all columns at once in registers of sixteen lanes, as many as fit in those of eight."""
    x, w, out, ahead = operands
    lanes = targets.of(magic).dot_lanes
    columns = [(panel, first) for panel in tile.panels for first in range(0, LANES, lanes)]
    at_once = len(columns) if lanes == LANES else max(1, NARROW_SUMS // (height * tile.planes))
    for start in range(0, len(columns), at_once):
        s = CodeSite(b, magic, height, columns[start : start + at_once], lanes, x, w, planes=tile.planes)
        look_ahead(s, ahead, streams=False)
        finish(s, tile.scaling(s, sums(s), grid), out)
