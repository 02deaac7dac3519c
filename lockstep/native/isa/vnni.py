"""x86 with dots of four bytes, unsigned by signed: VNNI in registers of eight lanes, in those of AVX-512, and there
with products of pairs of bfloat16."""

from dataclasses import replace

from lockstep.native.emit import BF16, vector, words
from lockstep.native.isa import dots, x86
from lockstep.native.isa.target import Cpu, Target
from lockstep.native.isa.x86 import ALDER_LAKE_ON, ICE_LAKES, SAPPHIRE_RAPIDS_ON
from lockstep.native.simd import call

AVX_VNNI_CPUS = (*ALDER_LAKE_ON, "sierraforest", "grandridge", "clearwaterforest", "gracemont")
AVX512_VNNI_CPUS = ("znver4", "znver5", "cascadelake", "cooperlake", *ICE_LAKES, *SAPPHIRE_RAPIDS_ON)
AVX512_BF16_CPUS = ("znver4", "znver5", "cooperlake", *SAPPHIRE_RAPIDS_ON)
AVX512_CPUS = (*AVX512_VNNI_CPUS, "skylake-avx512", "skx", "cannonlake", "x86-64-v4")


def dot(b, acc, w, a):
    return call(b, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, [acc, w, a])


def pair_dot(b, acc, x, y):
    return call(b, f"llvm.x86.avx512.vpdpwssd.{32 * acc.type.count}", acc.type, [acc, words(b, x), words(b, y)])


def bf16_dot(b, acc, x, w):
    """VDPBF16PS."""
    pairs = vector(BF16, 32)
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", acc.type, [acc, b.bitcast(x, pairs), b.bitcast(w, pairs)])


def has_avx512_vnni(cpu: Cpu) -> bool:
    return cpu.is_a(*x86.ARCHITECTURES) and cpu.has("avx512vnni", AVX512_VNNI_CPUS)


AVX_VNNI = Target(
    "avx_vnni",
    fits=lambda cpu: cpu.is_a(*x86.ARCHITECTURES) and cpu.has("avxvnni", AVX_VNNI_CPUS),
    machine=x86,
    lanes=8,
    registers=16,
    dot=dot,
    pair_dot=pair_dot,
    tiles=dots,
    unsigned=True,
    shuffle=x86.shuffle,
    shuffle_bytes=32,
    rounded_bytes=x86.rounded_bytes,
)
AVX512_VNNI = replace(
    AVX_VNNI,
    name="avx512_vnni",
    fits=has_avx512_vnni,
    lanes=16,
    registers=32,
    dot_lanes=16,
    shuffle_bytes=64,
)
AVX512_BF16 = replace(
    AVX512_VNNI,
    name="avx512_vnni-bf16",
    fits=lambda cpu: has_avx512_vnni(cpu) and cpu.has("avx512bf16", AVX512_BF16_CPUS),
    bf16_dot=bf16_dot,
)
