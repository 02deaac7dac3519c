"""Register tiles of pairs of bfloat16, for attention: `native/tiles.py` with two steps of a sum at a time.

Where FLUSH mode does not flush as the definition does (`WATCHED`), a loop over `tile_pairs` begins with `watched`, and
where the flag says that a sum has underflowed, `exact_pairs` computes all of them again (`native/flushing.py`).
"""

from llvmlite import ir
from numba import types

from lockstep.native import targets
from lockstep.native.flushing import either, exact_step, underflowed_after
from lockstep.native.simd import (
    I32,
    constant,
    emitted,
    f32x16,
    primitive,
    read_at,
    splat,
    write_at,
)
from lockstep.native.targets import ISA, TARGET
from lockstep.native.tiles import FMA_OPERANDS, V16F, V16I, at, outer, pack, read_tile, unpack

WATCHED = ISA.FLUSHING == "before rounding" and TARGET.bf16_dot is None


def _steps(step_of):
    """Emits `tile_pairs` by the function of a step that step_of(magic) gives."""

    def codegen(ctx, b, sig, args):
        value, x, x_row, w, w_column, mask = args
        shape, parts = sig.args[0], unpack(b, sig.args[0], value)
        mask_lanes = splat(b, b.trunc(mask, I32), V16I)
        columns = [b.and_(read_at(b, at(b, w, w_column, c), V16I, 64), mask_lanes) for c in range(shape.cols)]
        step_of(ctx.codegen().magic_tuple())(b, shape, parts, x, x_row, columns)
        return pack(b, shape, parts)

    return codegen


@primitive()
def tile_pairs(context, tile, x, x_row, w, w_column, mask):
    """tile[r, c] = f(x0[r], w0[c], f(x1[r], w1[c], tile[r, c])) for bfloat16 pairs (x0, x1), (w0, w1): two steps.

    f is an FMA with denormal operands taken as zero and denormal results flushed. Where the target has an instruction
    for f, x is bfloat16 pairs; elsewhere two float32, and FLUSH mode makes f of an FMA. mask: 32 bits, and-ed with w.
    """
    without = _exact_pairs if ISA.FLUSHING == "never" else _fma_pairs
    codegen = _steps(lambda magic: _dot_pairs(targets.of(magic).bf16_dot) or without)
    return tile(tile, *FMA_OPERANDS, types.int64), codegen


@primitive()
def exact_pairs(context, tile, x, x_row, w, w_column, mask):
    """`tile_pairs` of float32 x, in any mode of the CPU."""
    return tile(tile, *FMA_OPERANDS, types.int64), _steps(lambda magic: _exact_pairs)


def _dot_pairs(dot):
    """Emits a step with an instruction for it; None if there is none."""

    def emit(b, shape, parts, x, x_row, columns):
        for r in range(shape.rows):
            pair = splat(b, read_at(b, at(b, x, x_row, r), I32, 4), V16I)
            for c in range(shape.cols):
                parts[r, c] = dot(b, parts[r, c], pair, columns[c])

    return dot and emit


def _halves(b, columns):
    """The odd and the even halves of pairs, as float32."""
    odd = [b.bitcast(b.and_(v, constant(V16I, -65536)), V16F) for v in columns]
    return odd, [b.bitcast(b.shl(v, constant(V16I, 16)), V16F) for v in columns]


def _fma_pairs(b, shape, parts, x, x_row, columns):
    odd, even = _halves(b, columns)
    outer(b, shape, parts, x, x_row, odd, 4)
    outer(b, shape, parts, x, x_row, even, 0)


def _exact_pairs(b, shape, parts, x, x_row, columns):
    odd, even = _halves(b, columns)
    outer(b, shape, parts, x, x_row, odd, 4, exact_step)
    outer(b, shape, parts, x, x_row, even, 0, exact_step)


@emitted(types.void(types.int64, f32x16, f32x16))
def store_pairs(b, address, even, odd):
    """Stores bfloat16 (even[i], odd[i]) side by side, sixteen pairs: both must already be rounded."""
    low, high = (b.bitcast(v, V16I) for v in (even, odd))
    write_at(b, address, b.or_(high, b.lshr(low, constant(V16I, 16))), 4)


@primitive()
def watched(context, tile):
    """The same tile; LLVM must not begin its sums earlier."""

    def codegen(ctx, b, sig, args):
        parts = unpack(b, tile, args[0])
        return pack(b, tile, {cell: ISA.barrier(b, v, "") for cell, v in parts.items()})

    return tile(tile), codegen


@primitive()
def underflowed(context, tile):
    """Whether a sum has underflowed since `clear_underflow`, once the sums of this tile are there."""

    def codegen(ctx, b, sig, args):
        return underflowed_after(b, unpack(b, tile, args[0]).values())

    return types.boolean(tile), codegen


@emitted(types.void())
def clear_underflow(b):
    """Clears the flag that `underflowed` asks for."""
    ISA.clear_underflow(b)


@primitive()
def tile_started(context, tile, address, row_bytes):
    """A tile of the same shape: the one at an address, as `tiles.tile_load` reads it, or of +0 where that is 0."""

    def codegen(ctx, b, sig, args):
        zeros = pack(b, tile, {cell: constant(v.type, 0.0) for cell, v in unpack(b, tile, args[0]).items()})
        is_there, before = b.icmp_signed("!=", args[1], ir.Constant(args[1].type, 0)), b.block
        with b.if_then(is_there):
            loaded, loaded_from = pack(b, tile, read_tile(b, tile, args[1], args[2])), b.block
        return either(b, (loaded, loaded_from), (zeros, before))

    return tile(tile, types.int64, types.int64), codegen
