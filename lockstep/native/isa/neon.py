"""ARM with registers of 128 bits: SDOT, signed by signed, where the CPU has it."""

from dataclasses import replace

from lockstep.native.emit import by_halves
from lockstep.native.isa import aarch64, other
from lockstep.native.simd import call

APPLE_CPUS = ("apple-m", "apple-a13", "apple-a14", "apple-a15", "apple-a16", "apple-a17", "apple-a18")
CORTEX_CPUS = tuple(f"cortex-{name}" for name in "a55 a65 a75 a76 a77 a78 a510 a520 a710 a715 a720 a725 x".split())
SERVER_CPUS = ("neoverse", "ampere1", "grace", "olympus", "gb10", "fujitsu-monaka", "tsv110", "saphira", "oryon")
DOTPROD_CPUS = (*SERVER_CPUS, *APPLE_CPUS, *CORTEX_CPUS, "exynos-m4", "exynos-m5")
LANES = 4  # of a register


def sdot(b, acc, w, a):
    """Four lanes at a time."""
    return by_halves(b, lambda b, *v: call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", v[0].type, [*v]), acc, w, a)


def tbl(b, tables, codes):
    return call(b, "llvm.aarch64.neon.tbl1.v16i8", codes.type, [tables, codes])


NEON = replace(
    other.OTHER,
    fits=lambda cpu: cpu.is_a(*aarch64.ARCHITECTURES),
    machine=aarch64,
    lanes=LANES,
    registers=32,
    shuffle=tbl,
)
SDOT = replace(
    NEON,
    name="sdot",
    fits=lambda cpu: cpu.is_a(*aarch64.ARCHITECTURES) and cpu.has("dotprod", DOTPROD_CPUS, lists_all=False),
    dot=sdot,
)
