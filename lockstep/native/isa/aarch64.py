"""AArch64 (ARMv8 and newer). See `lockstep.native.isa`.

Flushing: x86 decides by the rounded result whether it is a denormal, FPCR.FZ by the exact one. They differ where the
exact result is in [2^-126 - 2^-151, 2^-126). FEAT_AFP, where the CPU has it, has modes (AH, FIZ) that are x86's.
"""

import functools
import pathlib
import platform
import subprocess

from llvmlite import ir

from lockstep.native.emit import cut, join
from lockstep.native.simd import I32, I64, call

FZ, AH, FIZ = 1 << 24, 1 << 1, 1 << 0  # of FPCR: flush to zero; x86's rounding before flushing; inputs, too
FUTEX = 98
REGISTER_BITS = 128
YIELD = 1  # of the hint instruction


@functools.cache
def has_x86_flushing() -> bool:
    """Whether this machine's CPU has FEAT_AFP, as its system says; False on another instruction set."""
    if platform.machine().lower() not in ("aarch64", "arm64"):
        return False
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "hw.optional.arm.FEAT_AFP"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == "1"
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return any(line.startswith("Features") and "afp" in line.split(":")[1].split() for line in lines)


IEEE, FLUSH = 0, FZ | AH | FIZ if has_x86_flushing() else FZ


def pause(b):
    call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, YIELD)])


def read_control(b):
    return call(b, "llvm.aarch64.get.fpcr", I64, [])


def write_control(b, word):
    call(b, "llvm.aarch64.set.fpcr", ir.VoidType(), [word])


def barrier(b, v, clobber):
    """A register at a time: an operand of an instruction is one."""
    count = v.type.count
    at_once = min(count, REGISTER_BITS // v.type.element.width)
    parts = [cut(b, v, start, at_once) for start in range(0, count, at_once)]
    for i, part in enumerate(parts):
        signature = ir.FunctionType(part.type, [part.type])
        parts[i] = b.asm(signature, "", f"=w,0{clobber if i == 0 else ''}", [part], side_effect=True)
    while len(parts) > 1:
        parts = [join(b, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]
