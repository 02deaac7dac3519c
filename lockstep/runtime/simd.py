"""SIMD values for kernels written in plain Python; with `tiles.py` and `machine.py` the only code that speaks LLVM.

A kernel is vectorised across independent outputs, 16 float32 lanes at a time (`f32x16`), whatever the target: LLVM
splits the sixteen lanes into as many registers as the machine needs, so one source gives the same bits everywhere.
Every function here works on a scalar `float32` and on lanes alike (a scalar among lanes is broadcast), and, where it
has a Python form, also uncompiled on `np.float32`: a definition can be run by an interpreter that shares no compiler
with the kernels.
"""
import ctypes
import ctypes.util
import functools
import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import _Intrinsic
from numba.extending import models, overload, register_model

LANES = 16
F32, F16, I1, I8, I16, I32, I64 = (ir.FloatType(), ir.HalfType(), *(ir.IntType(n) for n in (1, 8, 16, 32, 64)))


class Vec(types.Type):
    """Sixteen values in registers."""

    def __init__(self, element, name):
        self.ir = ir.VectorType(element, LANES)
        super().__init__(name=name)


@register_model(Vec)
class VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        super().__init__(manager, vec, vec.ir)


f32x16, i32x16, b1x16 = Vec(F32, "f32x16"), Vec(I32, "i32x16"), Vec(I1, "b1x16")


class Primitive(_Intrinsic):
    """A Numba intrinsic that, given a Python form, also runs uncompiled."""

    python = None

    def __call__(self, *args):
        if self.python is None:
            raise NotImplementedError(f"{self._name} works on SIMD values and has no uncompiled form")
        return self.python(*args)


def _null_is_valid(typer):
    """The typing function, its code marked so that an address computed from integers may be based on null.

    LLVM's code generation rewrites `inttoptr` sums as offsets from null, Numba optimizes helpers again after it, and a load
    from such an address would count as unreachable: loops disappeared.
    """
    @functools.wraps(typer)
    def typed(*args):
        signature, codegen = typer(*args)

        def marked(context, b, sig, values):
            set.add(b.function.attributes, "null_pointer_is_valid")
            return codegen(context, b, sig, values)

        return signature, marked

    return typed


def primitive(python=None):
    """Decorator: the typing function below it becomes a Primitive of the same name."""

    def wrap(typer):
        made = Primitive(typer.__name__, _null_is_valid(typer), prefer_literal=True)
        made.python = python
        made._register()
        return made

    return wrap


def splat(b, x, vector):
    """LLVM code that copies scalar x into all lanes."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, x, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def constant(llvm_type, value):
    """A constant for a scalar or vector type."""
    if isinstance(llvm_type, ir.VectorType):
        return ir.Constant(llvm_type, [value] * llvm_type.count)
    return ir.Constant(llvm_type, value)


def call(b, name, result, args):
    """Calls an LLVM or C function by name."""
    signature = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), args)


def suffix(llvm_type):
    return "v16f32" if isinstance(llvm_type, ir.VectorType) else "f32"


def floats(num_args, build):
    """Typing for a float32 function of scalars and lanes; lanes win, scalars are broadcast."""

    def typer(_, *args):
        result = f32x16 if any(a == f32x16 for a in args) else types.float32
        if not all(a in (f32x16, types.float32) for a in args):
            raise TypeError(f"expected float32 or f32x16, got {args}")

        def codegen(context, b, sig, values):
            llvm = context.get_value_type(sig.return_type)
            wide = [splat(b, v, llvm) if v.type != llvm else v for v in values]
            return build(b, llvm, wide)

        return result(*args), codegen

    return typer


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
    return floats(4, lambda b, t, a: b.select(b.fcmp_ordered("<", a[0], a[1]), a[2], a[3]))(context, x, bound, low, high)


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


# ---------------------------------------------------------------- memory, by address

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


SCALARS = {types.float32: F32, types.int32: I32, types.int64: I64, types.uint8: I8, types.int8: I8,
           types.uint16: I16, types.float16: I16}


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


# ---------------------------------------------------------------- lanes

@primitive()
def lanes(context, x):
    """A scalar float32 in all sixteen lanes."""
    return f32x16(types.float32), lambda context, b, sig, args: splat(b, args[0], f32x16.ir)


@primitive()
def lane(context, v, index):
    """One lane, by a literal index."""
    result = types.float32 if v == f32x16 else types.int32

    def codegen(context, b, sig, args):
        return b.extract_element(args[0], b.trunc(args[1], I32))

    return result(v, types.int64), codegen


@primitive(lambda x: int(x))
def to_i32(context, x):
    """float32 to int32, truncating; the value must be in range."""
    result = i32x16 if x == f32x16 else types.int32

    def codegen(context, b, sig, args):
        return b.fptosi(args[0], context.get_value_type(sig.return_type))

    return result(x), codegen


@primitive(lambda n: np.float32(n))
def to_f32(context, n):
    """int32 to float32, rounded to nearest."""
    result = f32x16 if n == i32x16 else types.float32

    def codegen(context, b, sig, args):
        return b.sitofp(args[0], context.get_value_type(sig.return_type))

    return result(n), codegen


def tree(b, values, combine):
    """Folds sixteen values: neighbours 8 apart, then 4, 2, 1. One fixed order for every reduction over lanes."""
    while len(values) > 1:
        half = len(values) // 2
        values = [combine(b, values[i], values[i + half]) for i in range(half)]
    return values[0]


def _halves(b, v):
    n = v.type.count // 2
    undefined = ir.Constant(v.type, ir.Undefined)
    pick = lambda start: b.shuffle_vector(v, undefined, ir.Constant(ir.VectorType(I32, n), list(range(start, start + n))))
    return pick(0), pick(n)


def _fold(combine):
    def typer(_, v):
        if v not in (f32x16, i32x16):
            raise TypeError(f"expected lanes, got {v}")

        def codegen(context, b, sig, args):
            x = args[0]
            while x.type.count > 1:
                x = combine(b, *_halves(b, x))
            return b.extract_element(x, ir.Constant(I32, 0))

        return (types.float32 if v == f32x16 else types.int32)(v), codegen

    return typer


def _add(b, x, y):
    return b.fadd(x, y) if x.type.element == F32 else b.add(x, y)


@primitive()
def sum_lanes(context, v):
    """Sum of the lanes by the fixed tree: lane i with i + 8, then i + 4, i + 2, i + 1 (see `tree_sum` for scalars)."""
    return _fold(_add)(context, v)


@primitive()
def max_lanes(context, v):
    """Largest lane."""
    return _fold(lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))(context, v)


def _arithmetic(name, build_float, build_int):
    def typer(context, x, y):
        if x == i32x16 or y == i32x16:
            def codegen(ctx, b, sig, args):
                wide = [splat(b, a, i32x16.ir) if a.type != i32x16.ir else a for a in args]
                return build_int(b, *wide)

            return i32x16(x, y), codegen
        return floats(2, lambda b, t, a: build_float(b, *a))(context, x, y)

    typer.__name__ = name
    return primitive()(typer)


lanes_add = _arithmetic("lanes_add", lambda b, x, y: b.fadd(x, y), lambda b, x, y: b.add(x, y))
lanes_sub = _arithmetic("lanes_sub", lambda b, x, y: b.fsub(x, y), lambda b, x, y: b.sub(x, y))
lanes_mul = _arithmetic("lanes_mul", lambda b, x, y: b.fmul(x, y), lambda b, x, y: b.mul(x, y))
lanes_div = _arithmetic("lanes_div", lambda b, x, y: b.fdiv(x, y), None)


def _operator(symbol, primitive_):
    @overload(symbol, inline="always")
    def choose(x, y):
        if isinstance(x, Vec) or isinstance(y, Vec):
            return lambda x, y: primitive_(x, y)


for _symbol, _primitive in ((operator.add, lanes_add), (operator.sub, lanes_sub), (operator.mul, lanes_mul),
                            (operator.truediv, lanes_div)):
    _operator(_symbol, _primitive)


@overload(operator.neg, inline="always")
def _negate(x):
    if x == f32x16:
        return lambda x: lanes_mul(x, np.float32(-1))


def _integer(build):
    """Typing for a function of int32 lanes; an integer scalar is broadcast, its low 32 bits."""

    def typer(_, *args):
        if i32x16 not in args or not all(a == i32x16 or isinstance(a, types.Integer) for a in args):
            raise TypeError(f"expected i32x16 and integers, got {args}")

        def codegen(ctx, b, sig, values):
            narrow = [b.trunc(v, I32) if v.type == I64 else v for v in values]
            return build(b, *[v if v.type == i32x16.ir else splat(b, v, i32x16.ir) for v in narrow])

        return i32x16(*[types.unliteral(a) for a in args]), codegen

    return typer


@primitive()
def bit_and(context, x, y):
    return _integer(lambda b, x, y: b.and_(x, y))(context, x, y)


@primitive()
def bit_xor(context, x, y):
    return _integer(lambda b, x, y: b.xor(x, y))(context, x, y)


@primitive()
def shift_right(context, x, count):
    """Logical shift: zeros come in."""
    return _integer(lambda b, x, n: b.lshr(x, n))(context, x, count)


def _build_high(b, x, y):
    wide = ir.VectorType(I64, LANES)
    product = b.mul(b.zext(x, wide), b.zext(y, wide))
    return b.trunc(b.lshr(product, constant(wide, 32)), x.type)


@primitive()
def high_product(context, x, y):
    """Upper 32 bits of the product of unsigned lanes; `*` gives the lower."""
    return _integer(_build_high)(context, x, y)


@primitive()
def lane_numbers(context):
    """0, 1, ... 15 as int32 lanes."""
    return i32x16(), lambda ctx, b, sig, args: ir.Constant(i32x16.ir, list(range(LANES)))
