"""Instruction sets that nothing is known about: pairs of bfloat16 are multiplied slowly. See `lockstep.native.isa`."""

from llvmlite import ir

from lockstep.native.simd import I64

IEEE, FLUSH, FUTEX = 0, 0, None
FLUSHING = "never"


def pause(b):
    pass


def read_control(b):
    return ir.Constant(I64, 0)


def write_control(b, word):
    pass


def barrier(b, v, clobber):
    return v
