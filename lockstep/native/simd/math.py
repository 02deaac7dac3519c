"""Arithmetic on float32, one at a time or sixteen: rounding, selection, bits; see `simd/__init__.py`.

Each function also runs uncompiled on `np.float32`.
"""

import ctypes
import ctypes.util

import numpy as np
from llvmlite import ir
from numba import types

from lockstep.native.simd.types import F32, I16, I32, call, constant, emitted, floats, i32x16, suffix


def _libm():
    return ctypes.CDLL(ctypes.util.find_library("m") or None)


_fmaf = _libm().fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


@floats(lambda x, y, z: np.float32(_fmaf(float(x), float(y), float(z))))
def fma(b, x, y, z):
    """x * y + z, rounded once."""
    return call(b, f"llvm.fma.{suffix(x.type)}", x.type, [x, y, z])


@floats(lambda x: np.sqrt(np.float32(x)))
def sqrt(b, x):
    """Correctly rounded square root."""
    return call(b, f"llvm.sqrt.{suffix(x.type)}", x.type, [x])


@floats(lambda x: np.rint(np.float32(x)))
def rint(b, x):
    """Nearest integer as float32, ties to even."""
    return call(b, f"llvm.roundeven.{suffix(x.type)}", x.type, [x])


@floats(lambda x: np.abs(np.float32(x)))
def absolute(b, x):
    return call(b, f"llvm.fabs.{suffix(x.type)}", x.type, [x])


@floats(lambda x, y: x if x > y else y)
def maximum(b, x, y):
    """x if x > y else y: a compare and a select, so a NaN in x gives y, on every target."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@floats(lambda x, y: x if x < y else y)
def minimum(b, x, y):
    """x if x < y else y."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@floats(lambda x, bound, low, high: low if x < bound else high)
def where_below(b, x, bound, low, high):
    """low if x < bound else high, lane by lane."""
    return b.select(b.fcmp_ordered("<", x, bound), low, high)


def _bits(t):
    """The integers whose bits a float type has."""
    return i32x16.ir if isinstance(t, ir.VectorType) else I32


@floats(lambda n: np.float32(2.0) ** np.float32(n))
def pow2(b, n):
    """2**n for integral n in [-126, 127], made from exponent bits."""
    integer = _bits(n.type)
    biased = b.add(b.fptosi(n, integer), constant(integer, 127))
    return b.bitcast(b.shl(biased, constant(integer, 23)), n.type)


@floats(lambda x: np.float32(np.frexp(np.float32(x))[1] - 1))
def exponent(b, x):
    """floor(log2(|x|)) as float32 for a normal x."""
    integer = _bits(x.type)
    field = b.and_(b.lshr(b.bitcast(x, integer), constant(integer, 23)), constant(integer, 255))
    return b.sitofp(b.sub(field, constant(integer, 127)), x.type)


@floats(lambda x: np.float32(2.0) * np.abs(np.frexp(np.float32(x))[0]))
def mantissa(b, x):
    """|x| / 2**exponent(x), in [1, 2), for a normal x."""
    integer = _bits(x.type)
    low = b.and_(b.bitcast(x, integer), constant(integer, 0x7FFFFF))
    return b.bitcast(b.or_(low, constant(integer, 0x3F800000)), x.type)


def _python_bf16(x):
    bits = int(np.float32(x).view(np.uint32))
    return np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


@floats(_python_bf16)
def round_bf16(b, x):
    """The nearest bfloat16, ties to even, as float32. NaN is not allowed."""
    integer = _bits(x.type)
    bits = b.bitcast(x, integer)
    odd = b.and_(b.lshr(bits, constant(integer, 16)), constant(integer, 1))
    rounded = b.add(b.add(bits, constant(integer, 0x7FFF)), odd)
    return b.bitcast(b.and_(rounded, constant(integer, -65536)), x.type)


@emitted(types.uint16(types.float32), lambda x: np.uint16(int(np.float32(x).view(np.uint32)) >> 16))
def bf16_bits(b, x):
    """The upper half of a float32's bits: the bfloat16 of a value that is one."""
    return b.trunc(b.lshr(b.bitcast(x, I32), ir.Constant(I32, 16)), I16)


@emitted(types.float32(types.int32), lambda n: np.uint32((int(n) & 0xFFFF) << 16).view(np.float32))
def bf16_f32(b, n):
    """The float32 whose upper half is the low 16 bits of an int32."""
    return b.bitcast(b.shl(n, ir.Constant(I32, 16)), F32)
