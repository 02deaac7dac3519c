"""Register tiles of exact integer sums over bytes, four at a time, as attention over an 8-bit cache needs them.

A step takes one row of the cache: four signed bytes for each of the sixteen lanes of a column. They are multiplied with
four numbers of each row of x, which are

    bytes    where the target multiplies bytes (`Target.unsigned`); elsewhere the same numbers as words
    words    int16 in the order 0, 2, 1, 3, so that a lane's even bytes and its odd ones make a pair each

Whatever the instructions, the sums are the same integers, which must fit in 31 bits.
"""

from llvmlite import ir
from numba import types

from lockstep.native import targets
from lockstep.native.emit import by_halves, fma, vector, words
from lockstep.native.simd import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    constant,
    emitted,
    i32x16,
    primitive,
    read_at,
    splat,
    write_at,
)
from lockstep.native.tiles import FMA_OPERANDS, V16F, V16I, Tile, at, cells, pack, unpack

SIGN_BITS = 0x80  # turns int8 into its code + 128, which is what VPDPBUSD multiplies
OFFSET = -128  # times the sum of a row of x: corrects a sum for the 128
EVEN_FIRST = [4 * i + j for i in range(4) for j in (0, 2, 1, 3)]


def _dots(b, target, dot, acc, x, w):
    """A dot of the target, `dot`, of a column: at once where vectors of integer sums hold one, or else by halves."""
    return dot(b, acc, x, w) if target.dot_lanes == LANES else by_halves(b, dot, acc, x, w)


def _columns_of_words(b, address, stride, cols):
    """Even and odd bytes of each column as pairs of int16."""
    columns = []
    for c in range(cols):
        pairs = words(b, read_at(b, at(b, address, stride, c), V16I, 64))
        eight = constant(pairs.type, 8)
        columns.append((b.ashr(b.shl(pairs, eight), eight), b.ashr(pairs, eight)))
    return columns


def _add_words(b, target, shape, parts, x, x_row, columns):
    for half in (0, 1):
        for r in range(shape.rows):
            pair = words(b, splat(b, read_at(b, at(b, x, x_row, r, 4 * half), I32, 4), V16I))
            for c in range(shape.cols):
                parts[r, c] = _dots(b, target, target.pair_dot, parts[r, c], pair, columns[c][half])


def _add_bytes(b, target, shape, parts, x, x_row, w, w_column):
    four = vector(I8, 4 * LANES)
    columns = [b.xor(read_at(b, at(b, w, w_column, c), four, 64), constant(four, SIGN_BITS)) for c in range(shape.cols)]
    for r in range(shape.rows):
        quad = b.bitcast(splat(b, read_at(b, at(b, x, x_row, r), I32, 4), V16I), four)
        for c in range(shape.cols):
            parts[r, c] = _dots(b, target, target.dot, parts[r, c], columns[c], quad)


def _step(tile, multiplies_bytes):
    """Signature and code of a step: tile[r, c] += x[r] . w[c], exactly."""

    def codegen(ctx, b, sig, args):
        value, x, x_row, w, w_column = args
        magic, shape, parts = ctx.codegen().magic_tuple(), sig.args[0], unpack(b, sig.args[0], value)
        target = targets.of(magic)
        if multiplies_bytes and target.unsigned:
            _add_bytes(b, target, shape, parts, x, x_row, w, w_column)
        else:
            _add_words(b, target, shape, parts, x, x_row, _columns_of_words(b, w, w_column, shape.cols))
        return pack(b, shape, parts)

    return tile(tile, *FMA_OPERANDS), codegen


@primitive()
def tile_add_bytes(context, tile, x, x_row, w, w_column):
    """tile[r, c] += x[r] . w[c] over four int8; with w + 128 instead of w where the target multiplies bytes."""
    return _step(tile, multiplies_bytes=True)


@primitive()
def tile_add_words(context, tile, x, x_row, w, w_column):
    """tile[r, c] += x[r] . w[c] over four words of x and four int8 of w."""
    return _step(tile, multiplies_bytes=False)


@primitive()
def tile_int_zeros(context, rows, cols):
    """A tile of int32 zeros."""
    tile = Tile(rows.literal_value, cols.literal_value, i32x16)
    return tile(rows, cols), lambda ctx, b, sig, args: pack(b, tile, {cell: constant(V16I, 0) for cell in cells(tile)})


@primitive()
def tile_int_spread(context, rows, cols, start, start_row):
    """A tile whose row r holds the int32 at start + r * start_row in all lanes."""
    tile = Tile(rows.literal_value, cols.literal_value, i32x16)

    def codegen(ctx, b, sig, args):
        values = [splat(b, read_at(b, at(b, args[2], args[3], r), I32, 4), V16I) for r in range(tile.rows)]
        return pack(b, tile, {(r, c): values[r] for r, c in cells(tile)})

    return tile(rows, cols, types.int64, types.int64), codegen


@primitive()
def tile_add_scaled(context, tile, scale, scale_row, out, out_row):
    """out[r, c] = fma(float(tile[r, c]), scale[r], out[r, c]) in memory, with the float32 scale of each row.

    All of out is read before any is written: where out_row is 0, one row in memory stands for two and is added to once.
    """

    def codegen(ctx, b, sig, args):
        value, scale, scale_row, out, out_row = args
        shape, parts = sig.args[0], unpack(b, sig.args[0], value)
        factors = [splat(b, read_at(b, at(b, scale, scale_row, r), F32, 4), V16F) for r in range(shape.rows)]
        addresses = {(r, c): at(b, out, out_row, r, 64 * c) for r, c in cells(shape)}
        totals = {
            (r, c): fma(b, b.sitofp(parts[r, c], V16F), factors[r], read_at(b, addresses[r, c], V16F, 4))
            for r, c in cells(shape)
        }
        for cell, total in totals.items():
            write_at(b, addresses[cell], total, 4)
        return ctx.get_dummy_value()

    return types.void(tile, *[types.int64] * 4), codegen


@emitted(types.void(types.int64, i32x16))
def store_words(b, address, value):
    """Stores sixteen int32, each of which fits, as words of x: int16, in every four the even ones first."""
    order = ir.Constant(vector(I32, LANES), EVEN_FIRST)
    ordered = b.shuffle_vector(value, ir.Constant(V16I, ir.Undefined), order)
    write_at(b, address, b.trunc(ordered, vector(I16, LANES)), 4)
