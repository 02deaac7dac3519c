"""What depends on the instruction set, and on nothing else of the CPU: one module for each, with the same names.

    IEEE, FLUSH             floating-point control words: round to nearest without traps; with denormals as zero
    FLUSHING                what FLUSH does, see `native.flushing`
    FUTEX                   Linux's number of the system call; None where there is none
    pause(b)                tells the core that this is a spin loop
    read_control(b)         the control word of this thread, int64
    write_control(b, word)  sets it
    barrier(b, v, clobber)  a vector behind an empty instruction that LLVM cannot see through
    underflowed(b)          where FLUSHING is "before rounding": whether a result has underflowed
    clear_underflow(b)      since this

`b` is the LLVM builder. Which dots, tables and registers a CPU of an instruction set has is `native.targets`' matter.
"""

from types import ModuleType

from lockstep.native.isa import aarch64, other, x86
from lockstep.native.kernel import target


def of(magic: tuple[str, str, str]) -> ModuleType:
    """The module of a target, (triple, cpu, features)."""
    triple = magic[0]
    if triple.startswith(("x86_64", "i686", "i386")):
        return x86
    return aarch64 if triple.startswith(("aarch64", "arm64")) else other


ISA = of(target())


def pinned(b, values):
    """The same vectors behind a barrier: LLVM neither reorders their computation nor moves loads across the barrier.

    Without it LLVM turns chains of integer additions into trees and hoists their loads, which spills registers.
    """
    clobber, result = ",~{memory}", []
    for v in values:
        result.append(ISA.barrier(b, v, clobber))
        clobber = ""
    return result
