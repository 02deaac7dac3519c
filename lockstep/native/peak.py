"""Arithmetic at the machine's limit, for benchmarks: chains of instructions that touch no memory."""

from numba import types

from lockstep.native.emit import counted, fma, moved, pointer, read, vector, write
from lockstep.native.simd import F32, I8, I32, constant, primitive
from lockstep.native.targets import of

CHAINS = 12  # enough to cover the latency of an FMA with two of them started each cycle


def lanes_per_register(magic):
    """float32 lanes of a register, or of two, so that CHAINS of them cover the latency of more units."""
    return max(8, of(magic).lanes)


def _spin(b, num_rounds, out, start, step):
    """num_rounds times values = step(values); the values are stored, so that LLVM does not drop the loop."""
    for k, v in enumerate(counted(b, num_rounds, start, lambda i, values: step(values))):
        write(b, moved(b, pointer(b, out), 64 * k), v)


@primitive()
def peak_f32(context, num_rounds, out):
    """num_rounds rounds of CHAINS FMAs over a register of float32 each; out: 64 * CHAINS bytes, zeroed before."""

    def codegen(ctx, b, sig, args):
        register = vector(F32, lanes_per_register(ctx.codegen().magic_tuple()))
        fixed = read(b, pointer(b, args[1]), register)
        num_rounds, out = args
        _spin(b, num_rounds, out, [fixed] * CHAINS, lambda values: [fma(b, fixed, fixed, v) for v in values])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@primitive()
def peak_int8(context, num_rounds, out):
    """`peak_f32` with dots of four int8: on AVX2 a multiplication, a widening and an addition each."""

    def codegen(ctx, b, sig, args):
        magic = ctx.codegen().magic_tuple()
        dot, lanes = of(magic).dot, lanes_per_register(magic)
        as_bytes = lambda v: b.bitcast(v, vector(I8, 4 * lanes))
        fixed = as_bytes(read(b, pointer(b, args[1]), vector(I32, lanes)))
        (num_rounds, out), start = args, [constant(vector(I32, lanes), k) for k in range(CHAINS)]
        _spin(b, num_rounds, out, start, lambda values: [dot(b, v, fixed, fixed) for v in values])
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
