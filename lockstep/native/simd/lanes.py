"""Sixteen lanes: made, converted, reduced, and with operators; see `simd/__init__.py`."""

import functools
import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload

from lockstep.native.simd.types import (
    F32,
    I32,
    I64,
    LANES,
    Vec,
    constant,
    emitted,
    f32x16,
    float_typing,
    i32x16,
    primitive,
    splat,
)


@emitted(f32x16(types.float32))
def lanes(b, x):
    """A scalar float32 in all sixteen lanes."""
    return splat(b, x, f32x16.ir)


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


def _halves(b, v):
    n = v.type.count // 2
    undefined = ir.Constant(v.type, ir.Undefined)
    indices = lambda start: ir.Constant(ir.VectorType(I32, n), list(range(start, start + n)))
    pick = lambda start: b.shuffle_vector(v, undefined, indices(start))
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
    """Sum of the lanes by the fixed tree: lane i with i + 8, then i + 4, i + 2, i + 1 (`tree_sum` for scalars)."""
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
        return float_typing((x, y), build_float)

    typer.__name__ = name
    return primitive()(typer)


def _operator(symbol, primitive_):
    @overload(symbol, inline="always")
    def choose(x, y):
        if isinstance(x, Vec) or isinstance(y, Vec):
            return lambda x, y: primitive_(x, y)


lanes_add = _arithmetic("lanes_add", lambda b, x, y: b.fadd(x, y), lambda b, x, y: b.add(x, y))
lanes_sub = _arithmetic("lanes_sub", lambda b, x, y: b.fsub(x, y), lambda b, x, y: b.sub(x, y))
lanes_mul = _arithmetic("lanes_mul", lambda b, x, y: b.fmul(x, y), lambda b, x, y: b.mul(x, y))
lanes_div = _arithmetic("lanes_div", lambda b, x, y: b.fdiv(x, y), None)
_operator(operator.add, lanes_add)
_operator(operator.sub, lanes_sub)
_operator(operator.mul, lanes_mul)
_operator(operator.truediv, lanes_div)


@overload(operator.neg, inline="always")
def _negate(x):
    if x == f32x16:
        return lambda x: lanes_mul(x, np.float32(-1))


def _integers(emit):
    """Decorator: the function below it emits a Primitive of int32 lanes; an integer scalar is broadcast, its low 32
    bits."""

    @functools.wraps(emit)
    def typer(_, *args):
        if i32x16 not in args or not all(a == i32x16 or isinstance(a, types.Integer) for a in args):
            raise TypeError(f"expected i32x16 and integers, got {args}")

        def codegen(ctx, b, sig, values):
            narrow = [b.trunc(v, I32) if v.type == I64 else v for v in values]
            return emit(b, *[v if v.type == i32x16.ir else splat(b, v, i32x16.ir) for v in narrow])

        return i32x16(*[types.unliteral(a) for a in args]), codegen

    return primitive()(typer)


@_integers
def bit_and(b, x, y):
    return b.and_(x, y)


@_integers
def bit_xor(b, x, y):
    return b.xor(x, y)


@_integers
def shift_right(b, x, num_bits):
    """Logical shift by num_bits: zeros come in."""
    return b.lshr(x, num_bits)


@_integers
def high_product(b, x, y):
    """Upper 32 bits of the product of unsigned lanes; `*` gives the lower."""
    wide = ir.VectorType(I64, LANES)
    product = b.mul(b.zext(x, wide), b.zext(y, wide))
    return b.trunc(b.lshr(product, constant(wide, 32)), x.type)


@emitted(i32x16())
def lane_numbers(b):
    """0, 1, ... 15 as int32 lanes."""
    return ir.Constant(i32x16.ir, list(range(LANES)))
