"""Register tiles for attention: rows of x by columns of sixteen lanes of w, kept in registers through a reduction.

All addresses are in bytes; `rows` and `cols` are literal integers, so that a tile is a fixed set of registers. Linear
layers have tiles of their own, which hold the whole loop (formats/parts/tiles.py).
"""

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from lockstep.native import targets
from lockstep.native.emit import dpbf16
from lockstep.native.simd import (
    F32,
    I32,
    I64,
    call,
    constant,
    emitted,
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


def _outer(b, tile, parts, x, x_row, columns, offset):
    """parts[r, c] = fma(x[r], columns[c], parts[r, c]) for the float32 at x + offset of every row."""
    for r in range(tile.rows):
        value = splat(b, read_at(b, at(b, x, x_row, r, offset), F32, 4), V16F)
        for c in range(tile.cols):
            parts[r, c] = call(b, "llvm.fma.v16f32", V16F, [value, columns[c], parts[r, c]])


@primitive()
def tile_fma_f32(context, tile, x, x_row, w, w_column):
    """tile[r, c] = fma(x[r], w[c], tile[r, c]): one step of the reduction over float32."""

    def codegen(ctx, b, sig, args):
        value, x, x_row, w, w_column = args
        shape, parts = sig.args[0], unpack(b, sig.args[0], value)
        columns = [read_at(b, at(b, w, w_column, c), V16F, 64) for c in range(shape.cols)]
        _outer(b, shape, parts, x, x_row, columns, 0)
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


@primitive()
def tile_load(context, rows, cols, address, row_bytes):
    """The tile whose row r lies at address + r * row_bytes, to continue a reduction."""
    tile = Tile(rows.literal_value, cols.literal_value)

    def codegen(ctx, b, sig, args):
        return pack(b, tile, {(r, c): read_at(b, at(b, args[2], args[3], r, 64 * c), V16F, 4) for r, c in cells(tile)})

    return tile(rows, cols, types.int64, types.int64), codegen


@primitive()
def tile_pairs(context, tile, x, x_row, w, w_column, mask):
    """tile[r, c] = f(x0[r], w0[c], f(x1[r], w1[c], tile[r, c])) for bfloat16 pairs (x0, x1), (w0, w1): two steps.

    f is an FMA with denormal operands taken as zero and denormal results flushed. Where the target has an instruction
    for f, x is bfloat16 pairs; elsewhere two float32, and FLUSH mode makes f of an FMA. mask: 32 bits, and-ed with w.
    """

    def codegen(ctx, b, sig, args):
        value, x, x_row, w, w_column, mask = args
        shape, parts = sig.args[0], unpack(b, sig.args[0], value)
        native = targets.bf16_dot(ctx.codegen().magic_tuple())
        mask_lanes = splat(b, b.trunc(mask, I32), V16I)
        columns = [b.and_(read_at(b, at(b, w, w_column, c), V16I, 64), mask_lanes) for c in range(shape.cols)]
        (_dot_pairs if native else _fma_pairs)(b, shape, parts, x, x_row, columns)
        return pack(b, shape, parts)

    return tile(tile, *FMA_OPERANDS, types.int64), codegen


def _dot_pairs(b, shape, parts, x, x_row, columns):
    for r in range(shape.rows):
        pair = splat(b, read_at(b, at(b, x, x_row, r), I32, 4), V16I)
        for c in range(shape.cols):
            parts[r, c] = dpbf16(b, parts[r, c], pair, columns[c])


def _fma_pairs(b, shape, parts, x, x_row, columns):
    odd = [b.bitcast(b.and_(v, constant(V16I, -65536)), V16F) for v in columns]
    even = [b.bitcast(b.shl(v, constant(V16I, 16)), V16F) for v in columns]
    _outer(b, shape, parts, x, x_row, odd, 4)
    _outer(b, shape, parts, x, x_row, even, 0)


@emitted(types.void(types.int64, f32x16, f32x16))
def store_pairs(b, address, even, odd):
    """Stores bfloat16 (even[i], odd[i]) side by side, sixteen pairs: both must already be rounded."""
    low, high = (b.bitcast(v, V16I) for v in (even, odd))
    write_at(b, address, b.or_(high, b.lshr(low, constant(V16I, 16))), 4)
