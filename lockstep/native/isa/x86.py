"""x86 with AVX2 or AVX-512: what its targets share."""

from llvmlite import ir
from numba.core import cgutils

from lockstep.native.emit import vector
from lockstep.native.isa.target import Cpu
from lockstep.native.simd import I8, I16, I32, I64, call, constant

IEEE, FLUSH = 0x1F80, 0x9FC0  # MXCSR; FLUSH adds flush-to-zero and denormals-are-zero
FLUSHING = "after rounding"
FUTEX = 202
ARCHITECTURES = ("x86_64", "i686", "i386")
SHUFFLES = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}
# LLVM's names of CPUs, or their beginnings, for a target that is named without its features
SAPPHIRE_RAPIDS_ON = ("sapphirerapids", "emeraldrapids", "graniterapids")
ALDER_LAKE_ON = ("alderlake", "raptorlake", "meteorlake", "arrowlake", "lunarlake", "pantherlake")
ICE_LAKES = ("icelake", "tigerlake", "rocketlake")
# Less comes too late or gets in the way of the hardware's own prefetches, more is read in vain where a claim ends:
# studies/13-prefetch-zen5.md, of registers with eight lanes studies/25-avx2.md
WIDE_AHEAD_BYTES, AHEAD_BYTES = 6656, 2048
# CPUs with a first-level data cache of 48 KB; the others have 32 KB
LARGE_FIRST_CACHE_CPUS = ("znver5", *ICE_LAKES, *SAPPHIRE_RAPIDS_ON, *ALDER_LAKE_ON)


def line_bytes(cpu: Cpu) -> int:
    return 64


def prefetch_locality(cpu: Cpu) -> int:
    return 3 if cpu.name.startswith(LARGE_FIRST_CACHE_CPUS) else 2


def ahead_bytes(lanes: int, register_lanes: int) -> int:
    return WIDE_AHEAD_BYTES if min(lanes, register_lanes) == 16 else AHEAD_BYTES


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


def maddubs(b, unsigned, signed):
    """Sums of pairs of products, int16; they saturate."""
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16), [unsigned, signed])


def maddwd(b, x, y):
    """Sums of pairs of products of int16, int32."""
    return call(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), [x, y])


def pair_sums(b, v):
    """int16 pairs as int32."""
    return maddwd(b, v, constant(v.type, 1))


def shuffle(b, tables, codes):
    """PSHUFB."""
    return call(b, SHUFFLES[codes.type.count], codes.type, [tables, codes])


def rounded_bytes(b, v):
    """`emit.rounded_bytes` in fewer instructions: converted by the control word's rounding, which is to nearest, and
    packed with saturation, which limits to a range that no value leaves."""
    wide = vector(I32, v.type.count)
    rounded = call(b, f"llvm.lrint.v{wide.count}i32.v{wide.count}f32", wide, [v])
    limited = call(b, f"llvm.smax.v{wide.count}i32", wide, [rounded, constant(wide, -128)])
    limited = call(b, f"llvm.smin.v{wide.count}i32", wide, [limited, constant(wide, 127)])
    return rounded, b.trunc(limited, vector(I8, wide.count))
