"""Loads and stores by address, of sixteen values or of one; see `simd.py`."""

from llvmlite import ir
from numba import types

from lockstep.runtime.simd_types import F16, F32, I8, I16, I32, I64, LANES, constant, f32x16, i32x16, primitive


def _read(b, address, llvm_type, align):
    loaded = b.load(b.inttoptr(address, llvm_type.as_pointer()))
    loaded.align = align
    return loaded


def _expand_bf16(b, raw):
    wide = b.zext(raw, ir.VectorType(I32, LANES))
    return b.bitcast(b.shl(wide, constant(wide.type, 16)), f32x16.ir)


def _loader(element, align, result, expand=lambda b, raw: raw):
    def typer(_, address):
        def codegen(context, b, sig, args):
            return expand(b, _read(b, args[0], ir.VectorType(element, LANES), align))

        return result(types.int64), codegen

    return typer


@primitive()
def load(context, address):
    """Sixteen float32 at an address."""
    return _loader(F32, 4, f32x16)(context, address)


@primitive()
def load_bf16(context, address):
    """Sixteen bfloat16, widened to float32."""
    return _loader(I16, 2, f32x16, _expand_bf16)(context, address)


@primitive()
def load_f16(context, address):
    """Sixteen float16, widened to float32."""
    return _loader(F16, 2, f32x16, lambda b, raw: b.fpext(raw, f32x16.ir))(context, address)


@primitive()
def load_i32(context, address):
    return _loader(I32, 4, i32x16)(context, address)


@primitive()
def load_i8(context, address):
    """Sixteen int8, widened to int32."""
    return _loader(I8, 1, i32x16, lambda b, raw: b.sext(raw, i32x16.ir))(context, address)


@primitive()
def load_u8(context, address):
    """Sixteen uint8, widened to int32."""
    return _loader(I8, 1, i32x16, lambda b, raw: b.zext(raw, i32x16.ir))(context, address)


def _storer(narrow):
    def typer(_, address, value):
        if value not in (f32x16, i32x16):
            raise TypeError(f"expected lanes, got {value}")

        def codegen(context, b, sig, args):
            raw = narrow(b, args[1])
            stored = b.store(raw, b.inttoptr(args[0], raw.type.as_pointer()))
            stored.align = 1
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return typer


@primitive()
def store(context, address, value):
    """Stores sixteen lanes of four bytes."""
    return _storer(lambda b, v: v)(context, address, value)


def _upper_half(b, v):
    bits = b.bitcast(v, i32x16.ir)
    return b.trunc(b.lshr(bits, constant(bits.type, 16)), ir.VectorType(I16, LANES))


@primitive()
def store_bf16(context, address, value):
    """Stores the upper halves: value must already be a bfloat16 (`round_bf16`)."""
    return _storer(_upper_half)(context, address, value)


@primitive()
def store_i8(context, address, value):
    """Stores sixteen int32 as int8; each must fit."""
    return _storer(lambda b, v: b.trunc(v, ir.VectorType(I8, LANES)))(context, address, value)


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
        return _read(b, args[0], SCALARS[result], 1)

    return result(types.int64, dtype), codegen


@primitive()
def poke(context, address, value):
    """Stores one scalar of its own type at an address."""

    def codegen(context, b, sig, args):
        stored = b.store(args[1], b.inttoptr(args[0], args[1].type.as_pointer()))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@primitive()
def peek_f16(context, address):
    """One float16, widened to float32."""

    def codegen(context, b, sig, args):
        return b.fpext(_read(b, args[0], F16, 2), F32)

    return types.float32(types.int64), codegen


@primitive()
def peek_bf16(context, address):
    """One bfloat16, widened to float32."""

    def codegen(context, b, sig, args):
        bits = b.zext(_read(b, args[0], I16, 2), I32)
        return b.bitcast(b.shl(bits, ir.Constant(I32, 16)), F32)

    return types.float32(types.int64), codegen
