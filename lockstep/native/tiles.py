"""Register tiles for attention: rows of x by columns of sixteen lanes of w, kept in registers through a reduction.

All addresses are in bytes; `rows` and `cols` are literal integers, so that a tile is a fixed set of registers. Linear
layers have tiles of their own, which hold the whole loop (formats/parts/tiles.py).
"""

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from lockstep.native.emit import fma
from lockstep.native.simd import (
    F32,
    I64,
    constant,
    f32x16,
    i32x16,
    primitive,
    read_at,
    splat,
    write_at,
)

V16F, V16I = f32x16.ir, i32x16.ir


class Tile(types.Type):
    """rows x cols vectors of sixteen float32, or int32."""

    def __init__(self, rows, cols, lanes=f32x16):
        self.rows, self.cols, self.lanes = rows, cols, lanes
        super().__init__(name=f"tile_{rows}x{cols}_{lanes}")

    @property
    def ir(self):
        return ir.ArrayType(self.lanes.ir, self.rows * self.cols)


@register_model(Tile)
class TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        super().__init__(manager, tile, tile.ir)


def at(b, address, stride, index, offset=0):
    """address + stride * index + offset."""
    if index:
        address = b.add(address, b.mul(stride, ir.Constant(I64, index)))
    return b.add(address, ir.Constant(I64, offset)) if offset else address


def cells(tile):
    return [(r, c) for r in range(tile.rows) for c in range(tile.cols)]


def unpack(b, tile, value):
    """{(row, column): vector} of the value of a tile."""
    return {(r, c): b.extract_value(value, r * tile.cols + c) for r, c in cells(tile)}


def pack(b, tile, parts):
    """The value of a tile of {(row, column): vector}."""
    value = ir.Constant(tile.ir, ir.Undefined)
    for r, c in cells(tile):
        value = b.insert_value(value, parts[r, c], r * tile.cols + c)
    return value


@primitive()
def tile_zeros(context, rows, cols):
    """A tile of +0."""
    tile = Tile(rows.literal_value, cols.literal_value)

    def codegen(ctx, b, sig, args):
        return pack(b, tile, {cell: constant(V16F, 0.0) for cell in cells(tile)})

    return tile(rows, cols), codegen


FMA_OPERANDS = [types.int64] * 4  # x, bytes between rows of x, w, bytes between columns of w


def outer(b, tile, parts, x, x_row, columns, offset, step=fma):
    """parts[r, c] = step(b, x[r], columns[c], parts[r, c]) for the float32 at x + offset of every row."""
    for r in range(tile.rows):
        value = splat(b, read_at(b, at(b, x, x_row, r, offset), F32, 4), V16F)
        for c in range(tile.cols):
            parts[r, c] = step(b, value, columns[c], parts[r, c])


@primitive()
def tile_fma_f32(context, tile, x, x_row, w, w_column):
    """tile[r, c] = fma(x[r], w[c], tile[r, c]): one step of the reduction over float32."""

    def codegen(ctx, b, sig, args):
        value, x, x_row, w, w_column = args
        shape, parts = sig.args[0], unpack(b, sig.args[0], value)
        columns = [read_at(b, at(b, w, w_column, c), V16F, 64) for c in range(shape.cols)]
        outer(b, shape, parts, x, x_row, columns, 0)
        return pack(b, shape, parts)

    return tile(tile, *FMA_OPERANDS), codegen


@primitive()
def tile_store(context, tile, out, out_row, num_cols):
    """Stores the first num_cols (at least 1) columns of a tile: row r at out + r * out_row."""

    def codegen(ctx, b, sig, args):
        value, out, out_row, num_cols = args
        shape = sig.args[0]
        parts = unpack(b, shape, value)
        for c in range(shape.cols):
            is_stored = b.icmp_signed(">", num_cols, ir.Constant(I64, c))
            with b.if_then(is_stored, likely=True):
                for r in range(shape.rows):
                    write_at(b, at(b, out, out_row, r, 64 * c), parts[r, c], 4)
        return ctx.get_dummy_value()

    return types.void(tile, *[types.int64] * 3), codegen


def read_tile(b, tile, address, row_bytes):
    """The parts of the tile whose row r lies at address + r * row_bytes."""
    return {(r, c): read_at(b, at(b, address, row_bytes, r, 64 * c), V16F, 4) for r, c in cells(tile)}


@primitive()
def tile_load(context, rows, cols, address, row_bytes):
    """The tile whose row r lies at address + r * row_bytes, to continue a reduction."""
    tile = Tile(rows.literal_value, cols.literal_value)

    def codegen(ctx, b, sig, args):
        return pack(b, tile, read_tile(b, tile, args[2], args[3]))

    return tile(rows, cols, types.int64, types.int64), codegen
