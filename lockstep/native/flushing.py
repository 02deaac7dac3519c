"""Sums of pairs of bfloat16 whose every step flushes denormals as VDPBF16PS does, on CPUs with other rules.

The definition, `formats.bf16.flushed_fma`, decides by the rounded result whether it is a denormal. `ISA.FLUSHING` says
what the CPU's FLUSH mode does:

    "after rounding"     the same
    "before rounding"    exact results in [2**-126 - 2**-151, 2**-126) become zero, not 2**-126. A flag stays set once
                         a result has underflowed, whatever came of it: then the sum is computed again, exactly
    "never"              there is no such mode: all sums are computed exactly

Sums of ordinary models never underflow, so that the flag costs an instruction for each tile.
"""

import contextlib

from llvmlite import ir

from lockstep.native.emit import by_halves, fma, vector
from lockstep.native.simd import F32, I64, LANES, call, constant
from lockstep.native.targets import ISA, TARGET

F64 = ir.DoubleType()
SMALLEST_NORMAL, FLUSH_BELOW = 2.0**-126, 2.0**-126 - 2.0**-151


def _named(b, name, *values):
    """An intrinsic of vectors of one type, which gives such a vector."""
    kind = f"v{values[0].type.count}f{32 if values[0].type.element == F32 else 64}"
    return call(b, f"llvm.{name}.{kind}", values[0].type, list(values))


def exact_step(b, x, w, acc):
    """`formats.bf16.flushed_fma` of vectors of float32, in any mode of the CPU: a call, since it is a lot of code."""
    name = f"exact_step_{x.type.count}"
    if name not in b.module.globals:
        function = ir.Function(b.module, ir.FunctionType(x.type, [x.type] * 3), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block())
        inner.ret(_stepped(inner, *function.args))
    return b.call(b.module.globals[name], [x, w, acc])


def _stepped(b, x, w, acc):
    zero, normal = constant(x.type, 0.0), constant(x.type, SMALLEST_NORMAL)
    is_small = lambda v: b.fcmp_ordered("<", _named(b, "fabs", v), normal)
    x, w, acc = (b.select(is_small(v), _named(b, "copysign", zero, v), v) for v in (x, w, acc))
    wide = vector(F64, x.type.count)
    exact = b.fadd(b.fmul(b.fpext(x, wide), b.fpext(w, wide)), b.fpext(acc, wide))
    # a sum that is zero exactly keeps the sign that an fma gives it; the narrowed sum has the sign of any other
    result, signed = fma(b, x, w, acc), b.fptrunc(exact, x.type)
    size, is_zero = _named(b, "fabs", exact), b.fcmp_ordered("==", exact, constant(wide, 0.0))
    is_flushed = b.fcmp_ordered("<", size, constant(wide, FLUSH_BELOW))
    tiny = b.select(is_flushed, _named(b, "copysign", zero, signed), _named(b, "copysign", normal, signed))
    is_tiny = b.and_(b.not_(is_zero), b.or_(is_flushed, is_small(result)))
    return b.select(is_tiny, tiny, result)


def as_defined(b, start, fast, exact):
    """The sums that fast(start), or, if one of its steps may have flushed wrongly, exact(start) emits.

    start: vectors. fast, exact: functions of such a list that return one; exact works by `exact_step`.
    """
    if ISA.FLUSHING != "before rounding":
        return (exact if ISA.FLUSHING == "never" else fast)(start)
    start = [ISA.barrier(b, v, "") for v in start]
    quick = fast(start)
    is_lost, quick_from = underflowed_after(b, quick), b.block
    again, done = b.append_basic_block("again"), b.append_basic_block("as_defined")
    b.cbranch(is_lost, again, done)
    b.position_at_end(again)
    slow = exact(start)
    ISA.clear_underflow(b)
    slow_from = b.block
    b.branch(done)
    b.position_at_end(done)
    return [either(b, (q, quick_from), (s, slow_from)) for q, s in zip(quick, slow, strict=True)]


@contextlib.contextmanager
def ieee_additions(b, flushes):
    """Yields a function that adds two vectors without flushing, in code that runs in FLUSH mode if `flushes`."""
    if not flushes or ISA.IEEE == ISA.FLUSH:
        yield b.fadd
        return
    ISA.write_control(b, ir.Constant(I64, ISA.IEEE))
    # behind barriers LLVM moves no addition to where the other mode holds
    yield lambda x, y: _behind_barrier(b, b.fadd(x, _behind_barrier(b, y)))
    ISA.write_control(b, ir.Constant(I64, ISA.FLUSH))


def _behind_barrier(b, v):
    """A vector of float32 behind a barrier, which takes what one register holds."""
    if v.type.count > LANES // 2 and not TARGET.is_wide:
        return by_halves(b, _behind_barrier, v)
    return ISA.barrier(b, v, "")


def underflowed_after(b, values):
    """Whether the flag is set once these values are there: LLVM must not read it earlier."""
    for v in values:
        ISA.barrier(b, v, "")
    return ISA.underflowed(b)


def either(b, *incoming):
    """The value of the block that control comes from. incoming: (value, block)."""
    merged = b.phi(incoming[0][0].type)
    for value, block in incoming:
        merged.add_incoming(value, block)
    return merged
