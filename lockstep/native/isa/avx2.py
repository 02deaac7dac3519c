"""AVX2: bytes are multiplied to sums of pairs in 16 bits, which saturate. AVX-512 without its dots does the same."""

from dataclasses import replace

from lockstep.native.emit import words
from lockstep.native.isa import saturating, x86
from lockstep.native.isa.target import Cpu, Target
from lockstep.native.isa.vnni import AVX512_CPUS, AVX_VNNI_CPUS

OLDER_CPUS = ("haswell", "core-avx2", "broadwell", "skylake", "znver", "bdver4", "x86-64-v3")


def has_avx2(cpu: Cpu) -> bool:
    return cpu.is_a(*x86.ARCHITECTURES) and cpu.has("avx2", (*AVX512_CPUS, *AVX_VNNI_CPUS, *OLDER_CPUS))


def dot(b, acc, w, a):
    """Exact only if no sum of two products saturates."""
    return b.add(acc, x86.pair_sums(b, x86.maddubs(b, w, a)))


def pair_dot(b, acc, x, y):
    return b.add(acc, x86.maddwd(b, words(b, x), words(b, y)))


AVX2 = Target(
    "avx2",
    fits=has_avx2,
    machine=x86,
    lanes=8,
    registers=16,
    dot=dot,
    pair_dot=pair_dot,
    tiles=saturating,
    shuffle=x86.shuffle,
    shuffle_bytes=32,
    rounded_bytes=x86.rounded_bytes,
    whole_tile=4,
)
AVX512 = replace(
    AVX2,
    fits=lambda cpu: has_avx2(cpu) and cpu.has("avx512f", AVX512_CPUS),
    lanes=16,
    registers=32,
    whole_tile=0,
)
