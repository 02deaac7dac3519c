"""x86 with AVX2 or AVX-512. See `lockstep.native.isa`."""

from llvmlite import ir
from numba.core import cgutils

from lockstep.native.simd import I8, I32, I64, call

IEEE, FLUSH = 0x1F80, 0x9FC0  # MXCSR; FLUSH adds flush-to-zero and denormals-are-zero
FLUSHING = "after rounding"
FUTEX = 202


def pause(b):
    call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])


def read_control(b):
    slot = cgutils.alloca_once(b, I32)
    call(b, "llvm.x86.sse.stmxcsr", ir.VoidType(), [b.bitcast(slot, I8.as_pointer())])
    return b.zext(b.load(slot), I64)


def write_control(b, word):
    slot = cgutils.alloca_once(b, I32)
    b.store(b.trunc(word, I32), slot)
    call(b, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [b.bitcast(slot, I8.as_pointer())])


def barrier(b, v, clobber):
    return b.asm(ir.FunctionType(v.type, [v.type]), "", f"=v,0{clobber}", [v], side_effect=True)
