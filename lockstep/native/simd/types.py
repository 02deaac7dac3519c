"""What SIMD values are to Numba, and the decorators that make functions on them; see `simd/__init__.py`."""

import functools

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import _Intrinsic
from numba.extending import models, register_model

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


f32x16, i32x16 = Vec(F32, "f32x16"), Vec(I32, "i32x16")


class Primitive(_Intrinsic):  # pyright: ignore[reportGeneralTypeIssues]  Numba's stubs call it final
    """A Numba intrinsic that, given a Python form, also runs uncompiled."""

    python = None

    def __call__(self, *args):
        if self.python is None:
            raise NotImplementedError(f"{self._name} works on SIMD values and has no uncompiled form")
        return self.python(*args)


def _null_is_valid(typer):
    """The typing function; functions that its code is emitted into are marked "null_pointer_is_valid".

    LLVM's code generation rewrites `inttoptr` sums as offsets from null, and Numba optimizes helpers once more after
    that: without the mark a load from such an address counts as unreachable, and loops disappeared.
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
    """Decorator: the typing function below it becomes a Primitive of the same name. python: its uncompiled form."""

    def wrap(typer):
        intrinsic = Primitive(typer.__name__, _null_is_valid(typer), prefer_literal=True)
        intrinsic.python = python
        intrinsic._register()  # noqa: SLF001 as Numba's own decorator does
        return intrinsic

    return wrap


def emitted(signature, python=None):
    """Decorator: the function below it, (builder, *LLVM values), emits a Primitive of a fixed Numba signature."""

    def wrap(emit):
        @functools.wraps(emit)
        def typer(_, *args):
            def codegen(context, b, sig, values):
                value = emit(b, *values)
                return context.get_dummy_value() if sig.return_type == types.void else value

            return signature, codegen

        return primitive(python)(typer)

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


def read_at(b, address, llvm_type, align=1):
    """Loads from an address."""
    loaded = b.load(b.inttoptr(address, llvm_type.as_pointer()))
    loaded.align = align
    return loaded


def write_at(b, address, value, align=1):
    """Stores at an address."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def widened(b, raw):
    """Sixteen bfloat16, held as int16, as float32."""
    wide = b.zext(raw, i32x16.ir)
    return b.bitcast(b.shl(wide, constant(wide.type, 16)), f32x16.ir)


def floats(python=None):
    """Decorator: the function below it, (builder, *LLVM values of one type), emits a Primitive of float32 scalars and
    lanes alike; lanes win, scalars are broadcast."""

    def wrap(emit):
        @functools.wraps(emit)
        def typer(_, *args):
            return float_typing(args, emit)

        return primitive(python)(typer)

    return wrap


def float_typing(args, emit):
    """The signature and code generation of `floats` for the types of some arguments."""
    result = f32x16 if any(a == f32x16 for a in args) else types.float32
    if not all(a in (f32x16, types.float32) for a in args):
        raise TypeError(f"expected float32 or f32x16, got {args}")

    def codegen(context, b, sig, values):
        llvm = context.get_value_type(sig.return_type)
        return emit(b, *[splat(b, v, llvm) if v.type != llvm else v for v in values])

    return result(*args), codegen
