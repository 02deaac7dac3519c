"""What kernels ask of an instruction set. Nothing here runs ARM code."""

import subprocess
import sys

import pytest
from llvmlite import ir

from lockstep.native import host, targets
from lockstep.native.isa import aarch64, neon, other, x86
from lockstep.native.simd import F32, I8, I32, I64
from tests.native.assembly import TRIPLE, assembled, initialize

X86, ARM, RISCV = ("x86_64-unknown-linux-gnu", "znver4", ""), (TRIPLE, "neoverse-n1", ""), ("riscv64-linux", "", "")
ARM_CPUS = ("neoverse-n1", "neoverse-v2", "apple-m1", "apple-m4")


@pytest.mark.parametrize(
    "magic, module", [(X86, x86), (ARM, aarch64), (("arm64-apple-darwin", "", ""), aarch64), (RISCV, other)]
)
def test_a_target_has_its_instruction_set(magic, module):
    assert targets.of(magic).machine is module
    needed = set("IEEE FLUSH FLUSHING FUTEX pause read_control write_control barrier".split())
    needed |= {"line_bytes", "prefetch_locality", "ahead_bytes"}
    needed |= {"underflowed", "clear_underflow"} if module.FLUSHING == "before rounding" else set()
    assert needed <= set(dir(module))


def test_loops_of_every_target_have_the_same_names():
    needed = {"unsigned_dots", "unpack_bytes", "byte_dots", "scaled_dots", "long_dots"}
    needed |= {"LESS_NEGATIVE", "SIGN_VECTORS"}
    assert all(needed <= set(dir(each.tiles)) for each in targets.TARGETS)


def test_a_cpu_has_the_first_target_that_it_fits():
    assert len({each.fits for each in targets.TARGETS}) == len(targets.TARGETS)
    cpus = {
        "znver4": targets.AVX512_BF16,
        "cascadelake": targets.AVX512_VNNI,
        "meteorlake": targets.AVX_VNNI,
        "skylake-avx512": targets.AVX512,
        "haswell": targets.AVX2,
    }
    assert {cpu: targets.of(("x86_64-unknown-linux-gnu", cpu, "")) for cpu in cpus} == cpus
    arm = {"neoverse-n1": targets.SDOT, "apple-m1": targets.SDOT, "cortex-a72": targets.NEON}
    assert {cpu: targets.of((TRIPLE, cpu, "")) for cpu in arm} == arm
    assert targets.of(RISCV) is targets.OTHER


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
        found = targets.of((TRIPLE, cpu, listed_by_linux))
        expected = targets.I8MM if cpu in ("neoverse-v2", "apple-m4") else targets.SDOT
        assert found is targets.of((TRIPLE, cpu, "")) is expected
    assert targets.of((TRIPLE, "unheard-of", "+neon,+dotprod")) is targets.SDOT
    assert targets.of((TRIPLE, "unheard-of", "+dotprod,+i8mm")) is targets.I8MM
    assert targets.of((TRIPLE, "neoverse-n1", "+neon,-dotprod")) is targets.NEON
    assert targets.of((TRIPLE, "cortex-a72", listed_by_linux)) is targets.NEON


def smmla(cpu):
    """Assembles SMMLA. LLVM ends the process where the CPU has none."""
    vector, name = "<4 x i32> %a, <16 x i8> %w, <16 x i8> %x", "@llvm.aarch64.neon.smmla.v4i32.v16i8"
    text = f"declare <4 x i32> {name}(<4 x i32>, <16 x i8>, <16 x i8>)\ndefine <4 x i32> @f({vector}) {{\n"
    initialize()
    made = assembled(f"{text}%r = call <4 x i32> {name}({vector})\nret <4 x i32> %r\n}}", cpu)
    assert made[1]["smmla"] == 1, cpu


def test_llvm_has_dots_for_every_cpu_that_is_named():
    """LLVM ends the process where a CPU has no such instruction."""
    newer = {"apple-m5", "oryon"}  # LLVM does not know the first yet, and the other by this name
    products, dots = [*(set(neon.I8MM_CPUS) - newer), "oryon-1"], [*(set(neon.DOTPROD_CPUS) - newer), "oryon-1"]
    code = (
        "from tests.native.assembly import sdot; from tests.native.test_isa import smmla\n"
        f"for cpu in {products}: smmla(cpu)\n"
        f"for cpu in {dots}: sdot(cpu)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "machine, lines, expected",
    [
        ("aarch64", ["Features\t: fp asimd asimddp i8mm"], ["+dotprod", "+i8mm"]),
        ("aarch64", ["Features\t: fp asimddp i8mm", "processor: 1", "Features\t: fp asimddp"], ["+dotprod", "-i8mm"]),
        ("aarch64", ["Features\t: fp"], ["-dotprod", "-i8mm"]),
        ("aarch64", ["BogoMIPS: 50"], []),
        ("x86_64", ["Features\t: asimddp"], []),
    ],
)
def test_linux_tells_what_llvm_does_not_list_of_arm(machine, lines, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("\n".join(lines))
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(host.platform, "machine", lambda: machine)
    assert host.unlisted_features() == expected
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "none")
    assert host.unlisted_features() == []
