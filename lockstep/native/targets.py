"""The target of the CPU that kernels are compiled for (not the host): an instruction that it lacks aborts the process.

What targets are is in `native/isa`.
"""

from lockstep.native.host import UnfitMachine
from lockstep.native.isa.avx2 import AVX2, AVX512
from lockstep.native.isa.neon import I8MM, NEON, SDOT
from lockstep.native.isa.other import OTHER
from lockstep.native.isa.target import Cpu, Target
from lockstep.native.isa.vnni import AVX512_BF16, AVX512_VNNI, AVX_VNNI
from lockstep.native.kernel import target

TARGETS = (
    AVX512_BF16,
    AVX512_VNNI,
    AVX_VNNI,
    AVX512,
    AVX2,
    I8MM,
    SDOT,
    NEON,
    OTHER,
)  # a CPU has the first that it fits


def of(magic: tuple[str, str, str]) -> Target:
    """The target of (triple, CPU, features). UnfitMachine if there is none: on x86 without AVX2."""
    cpu = Cpu(*magic)
    for each in TARGETS:
        if each.fits(cpu):
            return each
    raise UnfitMachine(f"Lockstep needs a CPU with AVX2 (any since 2015); {cpu.name or 'unnamed'!r} has none")


TARGET = of(target())
ISA = TARGET.machine
