"""Arithmetic at the machine's limit, for benchmarks: chains of instructions that touch no memory."""

from numba import types

from lockstep.native.emit import counted, fma, moved, pointer, read, vector, write
from lockstep.native.simd import F32, I8, I32, constant, primitive
from lockstep.native.targets import of

CHAINS = 12  # enough to cover the latency of an FMA with two of them started each cycle


def f32_lanes(magic):
    """float32 lanes of a register, or of two, so that CHAINS of them cover the latency of more units."""
    return max(8, of(magic).lanes)


def dot_lanes(magic):
    """Dots of four int8 that an instruction, or a sequence of them, makes at once."""
    return of(magic).dot_lanes


def _spin(b, num_rounds, out, start, step):
    """num_rounds times values = step(values); CHAINS values are stored, so that LLVM does not drop the loop."""
    for k, v in enumerate(counted(b, num_rounds, start, lambda i, values: step(values))[:CHAINS]):
        write(b, moved(b, pointer(b, out), 64 * k), v)


@primitive()
def peak_f32(context, num_rounds, out):
    """num_rounds rounds of CHAINS FMAs over a register of float32 each; out: 64 * CHAINS bytes, zeroed before."""

    def codegen(ctx, b, sig, args):
        register = vector(F32, f32_lanes(ctx.codegen().magic_tuple()))
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
        target, lanes = of(magic), dot_lanes(magic)

        def step(values):
            *sums, operand = values
            for k, total in enumerate(sums):
                # otherwise LLVM multiplies once for all dots, where multiplication and addition are two instructions
                operand = target.machine.barrier(b, operand, "")
                sums[k] = target.dot(b, total, operand, operand)
            return [*sums, operand]

        (num_rounds, out), sums = args, [constant(vector(I32, lanes), k) for k in range(CHAINS)]
        operand = b.bitcast(read(b, pointer(b, out), vector(I32, lanes)), vector(I8, 4 * lanes))
        _spin(b, num_rounds, out, [*sums, operand], step)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
