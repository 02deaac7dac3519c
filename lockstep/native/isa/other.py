"""Instruction sets that nothing is known about: general instructions, which LLVM has for every CPU. Pairs of bfloat16
are multiplied slowly."""

import sys

from llvmlite import ir

from lockstep.native.emit import vector
from lockstep.native.isa import dots
from lockstep.native.isa.target import Cpu, Target
from lockstep.native.simd import I32, I64, constant

IEEE, FLUSH, FUTEX = 0, 0, None
FLUSHING = "never"
AHEAD_BYTES = 6656  # as on x86 with sixteen lanes; nobody has measured it


def line_bytes(cpu: Cpu) -> int:
    return 64


def prefetch_locality(cpu: Cpu) -> int:
    return 2


def ahead_bytes(lanes: int, register_lanes: int) -> int:
    return AHEAD_BYTES if lanes == 16 else 0


def pause(b):
    pass


def read_control(b):
    return ir.Constant(I64, 0)


def write_control(b, word):
    pass


def barrier(b, v, clobber):
    return v


def dot(b, acc, w, a):
    """Signed by signed: every fourth product, four times."""
    wide_type = vector(I32, w.type.count)
    products = b.mul(b.sext(w, wide_type), b.sext(a, wide_type))
    for j in range(4):
        acc = b.add(acc, _every_fourth(b, products, j))
    return acc


def _every_fourth(b, v, start):
    lanes = list(range(start, v.type.count, 4))
    return b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), ir.Constant(vector(I32, len(lanes)), lanes))


def pair_dot(b, acc, x, y):
    """The upper product of a lane, then the lower one."""
    wide = acc.type
    for shift in (16, 0):
        parts = [b.ashr(b.shl(b.bitcast(v, wide), constant(wide, shift)), constant(wide, 16)) for v in (x, y)]
        acc = b.add(acc, b.mul(*parts))
    return acc


OTHER = Target(
    "generic",
    fits=lambda cpu: not cpu.is_a("x86_64", "i686", "i386"),
    machine=sys.modules[__name__],
    lanes=8,
    registers=16,
    dot=dot,
    pair_dot=pair_dot,
    tiles=dots,
)
