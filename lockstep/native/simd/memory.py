"""Loads and stores by address, of sixteen values or of one; see `simd/__init__.py`."""

from llvmlite import ir
from numba import types

from lockstep.native.simd.types import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    constant,
    emitted,
    f32x16,
    i32x16,
    primitive,
    read_at,
    widened,
    write_at,
)


@emitted(f32x16(types.int64))
def load(b, address):
    """Sixteen float32 at an address."""
    return read_at(b, address, f32x16.ir, 4)


@emitted(f32x16(types.int64))
def load_bf16(b, address):
    """Sixteen bfloat16, widened to float32."""
    return widened(b, read_at(b, address, ir.VectorType(I16, LANES), 2))


@emitted(f32x16(types.int64))
def load_f16(b, address):
    """Sixteen float16, widened to float32."""
    return b.fpext(read_at(b, address, ir.VectorType(F16, LANES), 2), f32x16.ir)


@emitted(i32x16(types.int64))
def load_i32(b, address):
    return read_at(b, address, i32x16.ir, 4)


@emitted(i32x16(types.int64))
def load_i8(b, address):
    """Sixteen int8, widened to int32."""
    return b.sext(read_at(b, address, ir.VectorType(I8, LANES)), i32x16.ir)


@emitted(i32x16(types.int64))
def load_u8(b, address):
    """Sixteen uint8, widened to int32."""
    return b.zext(read_at(b, address, ir.VectorType(I8, LANES)), i32x16.ir)


@primitive()
def store(context, address, value):
    """Stores sixteen lanes of four bytes."""
    if value not in (f32x16, i32x16):
        raise TypeError(f"expected lanes, got {value}")

    def codegen(context, b, sig, args):
        write_at(b, *args)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@emitted(types.void(types.int64, f32x16))
def store_bf16(b, address, value):
    """Stores the upper halves: value must already be a bfloat16 (`round_bf16`)."""
    bits = b.bitcast(value, i32x16.ir)
    write_at(b, address, b.trunc(b.lshr(bits, constant(bits.type, 16)), ir.VectorType(I16, LANES)))


@emitted(types.void(types.int64, i32x16))
def store_i8(b, address, value):
    """Stores sixteen int32 as int8; each must fit."""
    write_at(b, address, b.trunc(value, ir.VectorType(I8, LANES)))


SCALARS = {
    types.float32: F32,
    types.int32: I32,
    types.int64: I64,
    types.uint8: I8,
    types.int8: I8,
    types.uint16: I16,
    types.float16: I16,
}


@primitive()
def peek(context, address, dtype):
    """One scalar of a Numba type (`float32`, `int32`, `int64`, `uint8`, `int8`, `uint16`) at an address."""
    result = dtype.dtype

    def codegen(context, b, sig, args):
        return read_at(b, args[0], SCALARS[result])

    return result(types.int64, dtype), codegen


@primitive()
def poke(context, address, value):
    """Stores one scalar of its own type at an address."""

    def codegen(context, b, sig, args):
        write_at(b, *args)
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@emitted(types.float32(types.int64))
def peek_f16(b, address):
    """One float16, widened to float32."""
    return b.fpext(read_at(b, address, F16, 2), F32)


@emitted(types.float32(types.int64))
def peek_bf16(b, address):
    """One bfloat16, widened to float32."""
    return b.bitcast(b.shl(b.zext(read_at(b, address, I16, 2), I32), ir.Constant(I32, 16)), F32)
