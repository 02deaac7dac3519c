"""What kernels ask of an instruction set. Nothing here runs ARM code."""

import subprocess
import sys

import pytest
from llvmlite import ir

from lockstep.native import isa, targets
from lockstep.native.isa import aarch64, other, x86
from lockstep.native.simd import F32, I8, I32, I64
from tests.native.assembly import TRIPLE, assembled, initialize

X86, ARM, RISCV = ("x86_64-unknown-linux-gnu", "znver4", ""), (TRIPLE, "neoverse-n1", ""), ("riscv64-linux", "", "")
ARM_CPUS = ("neoverse-n1", "neoverse-v2", "apple-m1", "apple-m4")


@pytest.mark.parametrize(
    "magic, module", [(X86, x86), (ARM, aarch64), (("arm64-apple-darwin", "", ""), aarch64), (RISCV, other)]
)
def test_a_target_has_its_instruction_set(magic, module):
    assert isa.of(magic) is module
    assert all(
        hasattr(module, name) for name in "IEEE FLUSH FLUSHING FUTEX pause read_control write_control barrier".split()
    )
    needed = {"underflowed", "clear_underflow"} if module.FLUSHING == "before rounding" else set()
    assert needed <= set(dir(module))


def of_function(*arguments):
    """A builder within a function of a module, and the function's arguments."""
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), arguments), "f")
    return ir.IRBuilder(function.append_basic_block()), function.args


def counts(b, cpu="neoverse-n1"):
    b.ret_void()
    initialize()
    return assembled(str(b.module), cpu)[1]


def test_arm_waits_and_sets_its_control_word():
    b, [word] = of_function(I64)
    aarch64.pause(b)
    aarch64.write_control(b, word)
    aarch64.read_control(b)
    found = counts(b)
    assert found["yield"] == 1 and found["msr"] == 1


@pytest.mark.parametrize(
    "vector", [ir.VectorType(F32, 16), ir.VectorType(I32, 16), ir.VectorType(I32, 4), ir.VectorType(I8, 64)]
)
def test_a_barrier_on_arm_takes_a_register_at_a_time(vector):
    b, [place] = of_function(I8.as_pointer())
    place = b.bitcast(place, vector.as_pointer())
    b.store(aarch64.barrier(b, b.load(place), ",~{memory}"), place)
    num_registers = vector.count * (1 if vector.element == I8 else 4) // 16
    assert str(b.module).count("asm sideeffect") == num_registers
    assert counts(b)["ret"] == 1


def test_dots_of_four_bytes_are_found_on_arm():
    listed_by_linux = "+aes,+crc,+fp-armv8,+lse,+neon,-rand,+sha2,-sve"
    for cpu in ARM_CPUS:
        assert targets.int_dot((TRIPLE, cpu, listed_by_linux)) == targets.int_dot((TRIPLE, cpu, "")) == "sdot"
    assert targets.int_dot((TRIPLE, "unheard-of", "+neon,+dotprod")) == "sdot"
    assert targets.int_dot((TRIPLE, "neoverse-n1", "+neon,-dotprod")) == "generic"
    assert targets.int_dot((TRIPLE, "cortex-a72", listed_by_linux)) == "generic"


def test_llvm_has_dots_for_every_cpu_that_is_named():
    """LLVM ends the process where a CPU has no such instruction."""
    named = [cpu for cpu in targets.DOTPROD_CPUS if cpu not in ("neoverse", "apple-m", "cortex-x", "oryon")]
    code = (
        f"from tests.native.assembly import sdot; [sdot(cpu) for cpu in {[*named, *ARM_CPUS, 'cortex-x1', 'oryon-1']}]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
