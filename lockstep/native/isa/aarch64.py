"""AArch64 (ARMv8 and newer): what its targets share.

FEAT_AFP, which newer CPUs have, can flush after rounding, as x86 does. It is not used: the flag does not cost more than
an instruction for each tile, and all CPUs of ARM compute by one rule.
"""

from llvmlite import ir

from lockstep.native.emit import by_halves, cut, join
from lockstep.native.isa.target import Cpu
from lockstep.native.simd import F32, I32, I64, call

IEEE, FLUSH = 0, 1 << 24  # of FPCR: FZ, flush to zero
FLUSHING = "before rounding"
UNDERFLOW = 1 << 3  # of FPSR
FUTEX = 98
REGISTER_BITS = 128
AHEAD_BYTES = 6656  # as on x86 with sixteen lanes; nobody has measured it
YIELD = 1  # of the hint instruction
ARCHITECTURES = ("aarch64", "arm64")
LARGE_FIRST_CACHE_CPUS = ("apple", "neoverse", "grace", "ampere1", "oryon")  # 64 KB and more


def line_bytes(cpu: Cpu) -> int:
    return 128 if cpu.name.startswith("apple") else 64


def prefetch_locality(cpu: Cpu) -> int:
    return 3 if cpu.name.startswith(LARGE_FIRST_CACHE_CPUS) else 2


def ahead_bytes(lanes: int, register_lanes: int) -> int:
    return AHEAD_BYTES if lanes == 16 else 0


def pause(b):
    call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, YIELD)])


def read_control(b):
    return call(b, "llvm.aarch64.get.fpcr", I64, [])


def write_control(b, word):
    call(b, "llvm.aarch64.set.fpcr", ir.VoidType(), [word])


def underflowed(b):
    flags = call(b, "llvm.aarch64.get.fpsr", I64, [])
    return b.icmp_signed("!=", b.and_(flags, ir.Constant(I64, UNDERFLOW)), ir.Constant(I64, 0))


def clear_underflow(b):
    call(b, "llvm.aarch64.set.fpsr", ir.VoidType(), [ir.Constant(I64, 0)])


def barrier(b, v, clobber):
    """A register at a time: an operand of an instruction is one."""
    count, width = v.type.count, 32 if v.type.element == F32 else v.type.element.width
    at_once = min(count, REGISTER_BITS // width)
    parts = [cut(b, v, start, at_once) for start in range(0, count, at_once)]
    for i, part in enumerate(parts):
        signature = ir.FunctionType(part.type, [part.type])
        parts[i] = b.asm(signature, "", f"=w,0{clobber if i == 0 else ''}", [part], side_effect=True)
    while len(parts) > 1:
        parts = [join(b, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def sdot(b, acc, w, a):
    """Dots of four bytes, signed by signed, four lanes at a time."""
    return by_halves(b, lambda b, *v: call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", v[0].type, [*v]), acc, w, a)
