"""Arithmetic on float32, one at a time or sixteen: rounding, selection, bits; see `simd.py`.

Each also runs uncompiled on `np.float32`.
"""

import ctypes
import ctypes.util

import numpy as np
from llvmlite import ir
from numba import types

from lockstep.runtime.simd_types import F32, I16, I32, LANES, call, constant, floats, primitive, suffix


def _libm():
    return ctypes.CDLL(ctypes.util.find_library("m") or None)


_fmaf = _libm().fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def _python_fma(x, y, z):
    return np.float32(_fmaf(float(x), float(y), float(z)))


@primitive(_python_fma)
def fma(context, x, y, z):
    """x * y + z, rounded once."""
    return floats(3, lambda b, t, a: call(b, f"llvm.fma.{suffix(t)}", t, a))(context, x, y, z)


@primitive(lambda x: np.sqrt(np.float32(x)))
def sqrt(context, x):
    """Correctly rounded square root."""
    return floats(1, lambda b, t, a: call(b, f"llvm.sqrt.{suffix(t)}", t, a))(context, x)


@primitive(lambda x: np.rint(np.float32(x)))
def rint(context, x):
    """Nearest integer as float32, ties to even."""
    return floats(1, lambda b, t, a: call(b, f"llvm.roundeven.{suffix(t)}", t, a))(context, x)


@primitive(lambda x: np.abs(np.float32(x)))
def absolute(context, x):
    return floats(1, lambda b, t, a: call(b, f"llvm.fabs.{suffix(t)}", t, a))(context, x)


@primitive(lambda x, y: x if x > y else y)
def maximum(context, x, y):
    """x if x > y else y: a compare and a select, so a NaN in x gives y, on every target."""
    return floats(2, lambda b, t, a: b.select(b.fcmp_ordered(">", *a), *a))(context, x, y)


@primitive(lambda x, y: x if x < y else y)
def minimum(context, x, y):
    """x if x < y else y."""
    return floats(2, lambda b, t, a: b.select(b.fcmp_ordered("<", *a), *a))(context, x, y)


def _python_choose(x, bound, low, high):
    return low if x < bound else high


@primitive(_python_choose)
def where_below(context, x, bound, low, high):
    """low if x < bound else high, lane by lane."""
    return floats(4, lambda b, t, a: b.select(b.fcmp_ordered("<", a[0], a[1]), a[2], a[3]))(
        context, x, bound, low, high
    )


def _build_pow2(b, t, args):
    integer = ir.VectorType(I32, LANES) if isinstance(t, ir.VectorType) else I32
    biased = b.add(b.fptosi(args[0], integer), constant(integer, 127))
    return b.bitcast(b.shl(biased, constant(integer, 23)), t)


@primitive(lambda n: np.float32(2.0) ** np.float32(n))
def pow2(context, n):
    """2**n for integral n in [-126, 127], made from exponent bits."""
    return floats(1, _build_pow2)(context, n)


def _bits(b, t):
    return ir.VectorType(I32, LANES) if isinstance(t, ir.VectorType) else I32


def _build_exponent(b, t, args):
    integer = _bits(b, t)
    field = b.and_(b.lshr(b.bitcast(args[0], integer), constant(integer, 23)), constant(integer, 255))
    return b.sitofp(b.sub(field, constant(integer, 127)), t)


@primitive(lambda x: np.float32(np.frexp(np.float32(x))[1] - 1))
def exponent(context, x):
    """floor(log2(|x|)) as float32 for a normal x."""
    return floats(1, _build_exponent)(context, x)


def _build_mantissa(b, t, args):
    integer = _bits(b, t)
    low = b.and_(b.bitcast(args[0], integer), constant(integer, 0x7FFFFF))
    return b.bitcast(b.or_(low, constant(integer, 0x3F800000)), t)


@primitive(lambda x: np.float32(2.0) * np.abs(np.frexp(np.float32(x))[0]))
def mantissa(context, x):
    """|x| / 2**exponent(x), in [1, 2), for a normal x."""
    return floats(1, _build_mantissa)(context, x)


def _build_bf16(b, t, args):
    integer = _bits(b, t)
    bits = b.bitcast(args[0], integer)
    odd = b.and_(b.lshr(bits, constant(integer, 16)), constant(integer, 1))
    rounded = b.add(b.add(bits, constant(integer, 0x7FFF)), odd)
    return b.bitcast(b.and_(rounded, constant(integer, -65536)), t)


def _python_bf16(x):
    bits = int(np.float32(x).view(np.uint32))
    return np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


@primitive(_python_bf16)
def round_bf16(context, x):
    """The nearest bfloat16, ties to even, as float32. NaN is not allowed."""
    return floats(1, _build_bf16)(context, x)


@primitive(lambda x: np.uint16(int(np.float32(x).view(np.uint32)) >> 16))
def bf16_bits(context, x):
    """The upper half of a float32's bits: the bfloat16 of a value that is one."""

    def codegen(ctx, b, sig, args):
        return b.trunc(b.lshr(b.bitcast(args[0], I32), ir.Constant(I32, 16)), I16)

    return types.uint16(types.float32), codegen


@primitive(lambda n: np.uint32((int(n) & 0xFFFF) << 16).view(np.float32))
def bf16_f32(context, n):
    """The float32 whose upper half is the low 16 bits of an int32."""

    def codegen(ctx, b, sig, args):
        return b.bitcast(b.shl(args[0], ir.Constant(I32, 16)), F32)

    return types.float32(types.int32), codegen
