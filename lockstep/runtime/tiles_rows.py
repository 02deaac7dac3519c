"""Rows that lie anywhere in memory, named by a table of addresses: transposed to panels, or multiplied where they are.

A table holds one int64 address for each row. Rows may be anybody's memory: they need no alignment, and not a byte past
their end is read.
"""

from llvmlite import ir
from numba import types

from lockstep.runtime.emit import moved, pointer, prefetch, read, vector, write
from lockstep.runtime.simd import I16, I32, I64, LANES, constant, emitted, primitive, widened
from lockstep.runtime.tiles import V16F, V16I, _outer, pack, unpack

SECOND_CACHE = 2  # where rows are asked into: those of a page are so far apart that the first would hold few of them


def _shuffle(b, x, y, lanes):
    return b.shuffle_vector(x, y, ir.Constant(vector(I32, LANES), lanes))


def _within_quarters(picks):
    """Lanes of x (0..15) and y (16..31) that four picks within each 128-bit quarter choose."""
    return [4 * quarter + pick % 4 + 16 * (pick // 4) for quarter in range(4) for pick in picks]


def transposed(b, rows):
    """Sixteen vectors of sixteen, transposed: pairs and quads within quarters of a register, then whole quarters."""

    def pairs(rows, distance, low, high):
        made = []
        for start in range(0, 16, 2 * distance):
            for i in range(start, start + distance):
                both = rows[i], rows[i + distance]
                made += [_shuffle(b, *both, low), _shuffle(b, *both, high)]
        return made

    rows = pairs(rows, 1, _within_quarters((0, 4, 1, 5)), _within_quarters((2, 6, 3, 7)))
    rows = pairs(rows, 2, _within_quarters((0, 1, 4, 5)), _within_quarters((2, 3, 6, 7)))
    even, odd = (
        [4 * q + i + 16 * half for half in (0, 1) for q in quarters for i in range(4)] for quarters in ((0, 2), (1, 3))
    )
    columns = [None] * 16
    for j in range(4):  # rows[4 i + j]: quarter q holds column 4 q + j of rows 4 i .. 4 i + 3
        (a, c), (d, f) = ([_shuffle(b, rows[i + j], rows[i + 4 + j], lanes) for lanes in (even, odd)] for i in (0, 8))
        for q, (x, y, lanes) in enumerate(((a, d, even), (c, f, even), (a, d, odd), (c, f, odd))):
            columns[4 * q + j] = _shuffle(b, x, y, lanes)
    return columns


def _place(b, table, row, offset):
    """A pointer to the bytes at an offset of a row."""
    return moved(b, pointer(b, read(b, moved(b, table, 8 * row), I64, 8)), offset)


def _transposed(element, count):
    """Decorator: the function below it, which turns sixteen vectors of `count` elements into columns of sixteen lanes,
    becomes a primitive that does so for sixteen rows at an offset; columns are 64 bytes apart.

    It asks for a line of the rows that `ahead` names.
    """

    def wrap(columns_of):
        def emit(b, rows, offset, panel, ahead, ahead_offset):
            rows, panel, ahead = (pointer(b, address) for address in (rows, panel, ahead))
            for r in range(LANES):
                prefetch(b, _place(b, ahead, r, ahead_offset), SECOND_CACHE)
            values = [read(b, _place(b, rows, r, offset), vector(element, count)) for r in range(LANES)]
            for i, column in enumerate(columns_of(b, values)):
                write(b, moved(b, panel, 64 * i), column, 64)

        emit.__name__ = columns_of.__name__
        return emitted(types.void(*[types.int64] * 5))(emit)

    return wrap


@_transposed(I32, 16)
def transpose_f32(b, values):
    """Sixteen float32 of each row, to 16 columns."""
    return transposed(b, values)


@_transposed(I16, 16)
def transpose_bf16(b, values):
    """Sixteen bfloat16 of each row, to 16 columns of float32."""
    return transposed(b, [widened(b, v) for v in values])


@_transposed(I16, 32)
def transpose_bf16_pairs(b, values):
    """32 bfloat16 of each row, to 32 columns of float32: transposed as pairs, the lower half of a pair first."""
    upper = constant(V16I, -65536)
    for pair in transposed(b, [b.bitcast(v, V16I) for v in values]):
        yield b.bitcast(b.shl(pair, constant(V16I, 16)), V16F)
        yield b.bitcast(b.and_(pair, upper), V16F)


def _row(b, rows, row):
    """A pointer to a row of a table."""
    return pointer(b, read(b, moved(b, pointer(b, rows), b.mul(row, ir.Constant(I64, 8))), I64, 8))


def _fma_row(tile, size, load_column):
    """Typing of a step over a row of a table, `size` bytes a number."""

    def codegen(ctx, b, sig, args):
        shape, parts = sig.args[0], unpack(b, sig.args[0], args[0])
        start = moved(b, _row(b, args[3], args[4]), args[5])
        columns = [load_column(b, moved(b, start, 16 * size * c)) for c in range(shape.cols)]
        _outer(b, shape, parts, args[1], args[2], columns, 0)
        return pack(b, shape, parts)

    return tile(tile, *[types.int64] * 5), codegen


@primitive()
def tile_fma_row_f32(context, tile, x, x_row, rows, row, offset):
    """tile[r, c] = fma(x[r], w[c], tile[r, c]) with w at an offset of a float32 row of a table."""
    return _fma_row(tile, 4, lambda b, place: read(b, place, V16F, 4))


@primitive()
def tile_fma_row_bf16(context, tile, x, x_row, rows, row, offset):
    """`tile_fma_row_f32` of a bfloat16 row, widened exactly."""
    return _fma_row(tile, 2, lambda b, place: widened(b, read(b, place, vector(I16, LANES), 2)))


@primitive()
def tile_store_rows(context, tile, out, out_row, num_rows):
    """Stores the first num_rows (at least 1) rows of a float32 tile: row r at out + r * out_row."""

    def codegen(ctx, b, sig, args):
        shape, parts = sig.args[0], unpack(b, sig.args[0], args[0])
        for r in range(shape.rows):
            with b.if_then(b.icmp_signed(">", args[3], ir.Constant(I64, r)), likely=True):
                place = moved(b, pointer(b, args[1]), b.mul(args[2], ir.Constant(I64, r)))
                for c in range(shape.cols):
                    write(b, moved(b, place, 64 * c), parts[r, c], 4)
        return ctx.get_dummy_value()

    return types.void(tile, *[types.int64] * 3), codegen


@emitted(types.void(*[types.int64] * 3))
def ask(b, rows, row, offset):
    """Asks for the cache line at an offset of a row of a table; any address is allowed."""
    prefetch(b, moved(b, _row(b, rows, row), offset), SECOND_CACHE)
