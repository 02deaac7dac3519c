"""Rows that lie anywhere in memory, named by a table of addresses: transposed to panels, or multiplied where they are.

A table holds one int64 address for each row. Rows may lie in a caller's memory: they need no alignment, and not a byte
past their end is read.
"""

from collections import namedtuple

from llvmlite import ir
from numba import types

from lockstep.native.emit import moved, pointer, prefetch, read, vector, write
from lockstep.native.simd import F16, I8, I16, I32, I64, LANES, constant, emitted, f32x16, primitive, widened
from lockstep.native.tiles import V16F, V16I, outer, pack, unpack

SECOND_CACHE = 2  # rows are prefetched into this level: those of a page lie too far apart for the first to hold many


def _shuffle(b, x, y, lanes):
    return b.shuffle_vector(x, y, ir.Constant(vector(I32, LANES), lanes))


def _within_quarters(picks):
    """Lanes of x (0..15) and y (16..31) that four picks within each 128-bit quarter choose."""
    return [4 * quarter + pick % 4 + 16 * (pick // 4) for quarter in range(4) for pick in picks]


def transposed(b, rows):
    """Sixteen vectors of sixteen, transposed: pairs and quads within quarters of a register, then whole quarters."""

    def pairs(rows, distance, low, high):
        shuffled = []
        for start in range(0, 16, 2 * distance):
            for i in range(start, start + distance):
                both = rows[i], rows[i + distance]
                shuffled += [_shuffle(b, *both, low), _shuffle(b, *both, high)]
        return shuffled

    rows = pairs(rows, 1, _within_quarters((0, 4, 1, 5)), _within_quarters((2, 6, 3, 7)))
    rows = pairs(rows, 2, _within_quarters((0, 1, 4, 5)), _within_quarters((2, 3, 6, 7)))
    even, odd = (
        [4 * q + i + 16 * half for half in (0, 1) for q in quarters for i in range(4)] for quarters in ((0, 2), (1, 3))
    )
    columns = [None] * 16
    for j in range(4):  # rows[4 i + j]: quarter q holds column 4 q + j of rows 4 i .. 4 i + 3
        (top_even, top_odd), (low_even, low_odd) = (
            [_shuffle(b, rows[i + j], rows[i + 4 + j], lanes) for lanes in (even, odd)] for i in (0, 8)
        )
        evens, odds = (top_even, low_even), (top_odd, low_odd)
        for q, (halves, lanes) in enumerate(((evens, even), (odds, even), (evens, odd), (odds, odd))):
            columns[4 * q + j] = _shuffle(b, *halves, lanes)
    return columns


def _place(b, table, row, offset):
    """A pointer to the bytes at an offset of a row."""
    return moved(b, pointer(b, read(b, moved(b, table, 8 * row), I64, 8)), offset)


def _transpose(name, element, num_elements, columns_of):
    """A primitive that turns num_elements elements at an offset of sixteen rows of a table into columns of sixteen
    lanes, 64 bytes apart. columns_of: makes the columns of sixteen vectors, each the elements of a row.

    The primitive also prefetches a cache line of each row of the table `ahead`.
    """

    def emit(b, rows, offset, panel, ahead, ahead_offset):
        rows, panel, ahead = (pointer(b, address) for address in (rows, panel, ahead))
        for r in range(LANES):
            prefetch(b, _place(b, ahead, r, ahead_offset), SECOND_CACHE)
        values = [read(b, _place(b, rows, r, offset), vector(element, num_elements)) for r in range(LANES)]
        for i, column in enumerate(columns_of(b, values)):
            write(b, moved(b, panel, 64 * i), column, 64)

    emit.__name__ = f"transpose_{name}"
    return emitted(types.void(*[types.int64] * 5))(emit)


def _pairs(b, values):
    """Vectors of bfloat16 pairs as columns: transposed as pairs, the lower half of a pair first."""
    upper = constant(V16I, -65536)
    for pair in transposed(b, [b.bitcast(v, V16I) for v in values]):
        yield b.bitcast(b.shl(pair, constant(V16I, 16)), V16F)
        yield b.bitcast(b.and_(pair, upper), V16F)


def _fours(widen):
    """`_pairs` for vectors of fours of bytes; widen: makes float32 of a vector of bytes."""

    def columns_of(b, values):
        for four in transposed(b, [b.bitcast(v, V16I) for v in values]):
            for shift in (0, 8, 16, 24):
                yield widen(b, b.trunc(b.lshr(four, constant(V16I, shift)), vector(I8, LANES)))

    return columns_of


def _row(b, rows, row):
    """A pointer to a row of a table."""
    return pointer(b, read(b, moved(b, pointer(b, rows), b.mul(row, ir.Constant(I64, 8))), I64, 8))


def _fma_row(name, size, load_column):
    """A primitive: tile[r, c] = fma(x[r], w[c], tile[r, c]) with w at an offset of a row of a table, in numbers of
    `size` bytes."""

    def typer(context, tile, x, x_row, rows, row, offset):
        def codegen(ctx, b, sig, args):
            shape, parts = sig.args[0], unpack(b, sig.args[0], args[0])
            start = moved(b, _row(b, args[3], args[4]), args[5])
            columns = [load_column(b, moved(b, start, 16 * size * c)) for c in range(shape.cols)]
            outer(b, shape, parts, args[1], args[2], columns, 0)
            return pack(b, shape, parts)

        return tile(tile, *[types.int64] * 5), codegen

    typer.__name__ = f"tile_fma_row_{name}"
    return primitive()(typer)


def _load(name, load_column):
    """A primitive: sixteen numbers at an address, widened to float32."""

    def emit(b, address):
        return load_column(b, pointer(b, address))

    emit.__name__ = f"load_{name}"
    return emitted(f32x16(types.int64))(emit)


def _half_bits(b, codes, shift):
    """Bytes as the bits of float16: the sign as it is, the rest moved up."""
    wide = b.zext(codes, vector(I16, LANES))
    sign = b.and_(b.shl(wide, constant(wide.type, 8)), constant(wide.type, -32768))
    rest = b.shl(b.and_(wide, constant(wide.type, 0x7F)), constant(wide.type, shift))
    return b.bitcast(b.or_(sign, rest), vector(F16, LANES))


def _from_e5m2(b, codes):
    """float8 with 5 bits of exponent: the upper half of a float16."""
    return b.fpext(_half_bits(b, codes, 8), V16F)


def _from_e4m3(b, codes):
    """float8 with 4 bits of exponent, no infinity and one NaN of each sign: as a float16 it is 2**8 too small."""
    value = b.fmul(b.fpext(_half_bits(b, codes, 7), V16F), constant(V16F, 256.0))
    is_nan = b.icmp_unsigned("==", b.and_(codes, constant(codes.type, 0x7F)), constant(codes.type, 0x7F))
    return b.select(is_nan, constant(V16F, float("nan")), value)


def _from_i8(b, codes):
    return b.sitofp(b.sext(codes, V16I), V16F)


def _floats(b, place):
    return read(b, place, V16F, 4)


def _bfloats(b, place):
    return widened(b, read(b, place, vector(I16, LANES), 2))


def _of_bytes(name, widen):
    """RowNumbers of a type of one byte."""

    def load_column(b, place):
        return widen(b, read(b, place, vector(I8, LANES)))

    def columns_of(b, values):
        return transposed(b, [widen(b, v) for v in values])

    return RowNumbers(
        1,
        _load(name, load_column),
        _transpose(name, I8, 16, columns_of),
        64,
        _transpose(f"{name}_fours", I8, 64, _fours(widen)),
        _fma_row(name, 1, load_column),
    )


# How rows of a type of numbers are read, all widened to float32, which is exact. size: bytes of a number; load: sixteen
# numbers at an address; transpose, transpose_wide: sixteen numbers, or `wide` numbers, of each of sixteen rows become
# columns; fma_row: multiplies a tile with a row where the row lies
RowNumbers = namedtuple("RowNumbers", "size load transpose wide transpose_wide fma_row")

_transpose_f32 = _transpose("f32", I32, 16, transposed)
ROW_NUMBERS = {
    "f32": RowNumbers(4, _load("f32", _floats), _transpose_f32, 16, _transpose_f32, _fma_row("f32", 4, _floats)),
    "bf16": RowNumbers(
        2,
        _load("bf16", _bfloats),
        _transpose("bf16", I16, 16, lambda b, values: transposed(b, [widened(b, v) for v in values])),
        32,
        _transpose("bf16_pairs", I16, 32, _pairs),
        _fma_row("bf16", 2, _bfloats),
    ),
    "f8_e4m3": _of_bytes("f8_e4m3", _from_e4m3),
    "f8_e5m2": _of_bytes("f8_e5m2", _from_e5m2),
    "i8": _of_bytes("i8", _from_i8),
}


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
def prefetch_row(b, rows, row, offset):
    """Prefetches the cache line at an offset of a row of a table; any address is allowed."""
    prefetch(b, moved(b, _row(b, rows, row), offset), SECOND_CACHE)
