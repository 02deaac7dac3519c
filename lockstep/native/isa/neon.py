"""ARM with registers of 128 bits: SDOT, signed by signed, and SMMLA, where the CPU has them."""

from dataclasses import replace

from lockstep.native.emit import moved, read, vector
from lockstep.native.isa import aarch64, other, rows_in_pairs
from lockstep.native.simd import I8, I32, call, constant

# LLVM's names of CPUs, or their beginnings: of an ARM host on Linux it lists only some features
APPLE_I8MM = tuple(f"apple-{name}" for name in "m2 m3 m4 m5 a15 a16 a17 a18".split())
CORTEX_I8MM = tuple(f"cortex-{name}" for name in "a510 a520 a710 a715 a720 a725 x2 x3 x4 x925".split())
NEOVERSE_I8MM = tuple(f"neoverse-{name}" for name in "512tvb n2 n3 v1 v2 v3".split())
I8MM_CPUS = (*APPLE_I8MM, *CORTEX_I8MM, *NEOVERSE_I8MM, *"ampere1 grace olympus gb10 fujitsu-monaka oryon".split())
CORTEX = tuple(f"cortex-{name}" for name in "a55 a65 a75 a76 a77 a78 x1".split())
OTHERS = tuple("apple-m1 apple-a13 apple-a14 neoverse-n1 neoverse-e1 tsv110 saphira exynos-m4 exynos-m5".split())
DOTPROD_CPUS = (*I8MM_CPUS, *CORTEX, *OTHERS)
LANES = 4  # of a register


def quad(s, place, g):
    """As a lane of sixteen codes, which are loaded once for four groups."""
    b, four = s.b, vector(I32, LANES)
    codes = read(b, moved(b, place, -4 * (g % 4)), four)
    return b.bitcast(b.shuffle_vector(codes, codes, constant(vector(I32, s.lanes), g % 4)), vector(I8, 4 * s.lanes))


def tbl(b, tables, codes):
    return call(b, "llvm.aarch64.neon.tbl1.v16i8", codes.type, [tables, codes])


NEON = replace(
    other.OTHER,
    fits=lambda cpu: cpu.is_a(*aarch64.ARCHITECTURES),
    machine=aarch64,
    lanes=LANES,
    registers=32,
    shuffle=tbl,
    shifts_bytes=True,
)
SDOT = replace(
    NEON,
    name="sdot",
    fits=lambda cpu: cpu.is_a(*aarch64.ARCHITECTURES) and cpu.has("dotprod", DOTPROD_CPUS, lists_all=False),
    dot=aarch64.sdot,
    quad=quad,
)
I8MM = replace(
    SDOT,
    name="i8mm",
    fits=lambda cpu: cpu.is_a(*aarch64.ARCHITECTURES) and cpu.has("i8mm", I8MM_CPUS, lists_all=False),
    tiles=rows_in_pairs,
    in_order=rows_in_pairs.in_pairs,
    by_feature=rows_in_pairs.by_feature,
)
