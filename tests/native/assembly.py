"""Kernels in another instruction set's machine code, which this machine cannot run: LLVM assembles for all of them.

    python -m tests.native.assembly CPU,CPU MODULE:KERNEL MODULE:KERNEL

prints, for each kernel (each of the package, if none is named) and each CPU of AArch64 Linux, its path, the CPU, the
size of its object file in bytes, and {mnemonic: count}. Everything that emits code, LLVM's passes included, believes
that the target is the first CPU.
"""

import importlib
import json
import pkgutil
import re
import sys
from collections import Counter
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import types
from numba.core import caching, codegen
from numba.core.registry import cpu_target

import lockstep
from lockstep.native import kernel

TRIPLE = "aarch64-unknown-linux-gnu"
LAYOUT = "e-m:e-p270:32:32-p271:32:32-p272:64:64-i8:8:32-i16:16:32-i64:64-i128:128-n32:64-S128-Fn32"
RUNTIME = "nrt"  # Numba's own, the only library that is compiled for this machine
THREADS = tuple(f"lockstep.runtime.threads:{name}" for name in ("run_step", "help_forever", "_quit"))
DECLARED = re.compile(r"^declare [^@]*@\"?([\w.]+)", re.MULTILINE)
LIBM = re.compile(
    r"(llvm\.)?a?(exp|exp2|exp10|expm1|log|log2|log10|log1p|pow|powi|cbrt|hypot|sin|cos|tan|sincos|erf|erfc|gamma|ldexp)"
    r"(h|f|l)?(\..*)?"
)
# mask and bits of the instructions on vectors of 128 bits: by a vector, and by one of its elements
PRODUCTS = {
    "sdot": ((0xFFE0FC00, 0x4E809400), (0xFFC0F400, 0x4F80E000)),
    "smmla": ((0xFFE0FC00, 0x4E80A400),),
    "fmla": ((0xFFE0FC00, 0x4E20CC00), (0xFFC0F400, 0x4F801000)),
}
HEADER = re.compile(r"^target (triple|datalayout) = .*$", re.MULTILINE)


_name = ""  # of the kernel that is compiled


class Captured(BaseException):
    """Ends a compilation where machine code would be made. module: the kernel's whole module, as text."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module


def initialize() -> None:
    """Has LLVM know all instruction sets."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def sdot(cpu: str) -> None:
    """Assembles a dot of four bytes. LLVM ends the process where the CPU has none."""
    vector, dot = "<4 x i32> %a, <16 x i8> %w, <16 x i8> %x", "@llvm.aarch64.neon.sdot.v4i32.v16i8"
    types = vector.replace(" %a", "").replace(" %w", "").replace(" %x", "")
    text = f"declare <4 x i32> {dot}({types})\ndefine <4 x i32> @f({vector}) {{\n%r = call <4 x i32> {dot}({vector})\n"
    initialize()
    assert assembled(text + "ret <4 x i32> %r\n}", cpu)[1]["sdot"] == 1, cpu


def machine(cpu: str) -> llvm.TargetMachine:
    """What makes machine code for a CPU."""
    return llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=cpu, opt=3)


def pretend(cpu: str) -> None:
    """Has kernels emitted for a CPU; must be called before the modules that hold them are imported.

    No module of theirs may reach Numba's engine, nor come from a cache: where it generates code for this machine, it
    changes modules in place, atomics into x86's own, say, which kernels that are linked with them would contain.
    """
    kernel.target = lambda: (TRIPLE, cpu, "")
    context: Any = cpu_target.target_context
    context.codegen()._tm = machine(cpu)  # noqa: SLF001 which LLVM's passes ask what vectors and loops cost
    codegen.Codegen.magic_tuple = codegen.CPUCodegen.magic_tuple = lambda self: (TRIPLE, cpu, "")

    finalize, add = codegen.JITCodeLibrary._finalize_specific, codegen.JITCPUCodegen._add_module  # noqa: SLF001

    def finalize_specific(library: codegen.JITCodeLibrary) -> None:
        if library.name == RUNTIME:
            as_it_was = library._final_module.clone()  # noqa: SLF001
            finalize(library)
            library._final_module = as_it_was  # noqa: SLF001
        elif library.name == _name:
            raise Captured(str(library._final_module))  # noqa: SLF001

    def add_module(generator: codegen.JITCPUCodegen, module: llvm.ModuleRef) -> None:
        if module.name == RUNTIME:
            add(generator, module)

    codegen.JITCodeLibrary._finalize_specific = finalize_specific  # noqa: SLF001 Numba has no other name
    codegen.JITCPUCodegen._add_module = add_module  # noqa: SLF001
    caching.Cache.load_overload = caching.Cache.save_overload = lambda *_: None
    codegen.JITCPUCodegen.set_env = lambda *_: None  # it would have helpers compiled for this machine


def emitted(path: str) -> str:
    """The LLVM module of a kernel, by its path."""
    global _name
    module, _name = path.split(":")
    function = getattr(importlib.import_module(module), _name)
    try:
        if isinstance(function, kernel.Kernel):
            function.compile()
        else:  # one that is called from Python, with integers
            function.compile((types.int64,) * function.py_func.__code__.co_argcount)
    except Captured as captured:
        return captured.module
    raise AssertionError(f"{path} was not compiled anew")


def parsed(text: str) -> llvm.ModuleRef:
    """The module for AArch64. AssertionError if it calls libm."""
    assert not libm_of(text), libm_of(text)
    text = HEADER.sub("", text)
    return llvm.parse_assembly(f'target datalayout = "{LAYOUT}"\ntarget triple = "{TRIPLE}"\n{text}')


def libm_of(text: str) -> set[str]:
    """The functions of libm that a module calls, by its own or LLVM's name for them."""
    return {name for name in DECLARED.findall(text) if LIBM.fullmatch(name)}


def assembled(text: str, cpu: str) -> tuple[int, Counter[str]]:
    """The bytes of the object file, and how often each mnemonic occurs. RuntimeError where LLVM cannot do it."""
    module = parsed(text)
    lines = machine(cpu).emit_assembly(module).splitlines()
    words = (line.split()[0] for line in lines if line.startswith("\t") and not line.startswith(("\t.", "\t//")))
    return len(machine(cpu).emit_object(module)), Counter(words)


def counted(text: str, cpu: str) -> dict[str, int]:
    """How often the instructions that make products occur in the machine code: `assembled` in half the time."""
    code = machine(cpu).emit_object(parsed(text))
    words = np.frombuffer(code, "<u4", len(code) // 4)
    return {name: int(sum(((words & mask) == bits).sum() for mask, bits in forms)) for name, forms in PRODUCTS.items()}


def every_kernel() -> list[str]:
    """The paths of the kernels of the package, and of what its threads run."""
    names = [m.name for m in pkgutil.walk_packages(lockstep.__path__, "lockstep.") if not m.name.endswith("__main__")]
    values = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return sorted({value.path for value in values if isinstance(value, kernel.Kernel)} | set(THREADS))


def product_of(path: str) -> str | None:
    """The instruction that the inner loop of a format's linear layer is made of; None for other kernels."""
    from lockstep.formats import FORMATS
    from lockstep.formats.parts.rows import QUANTIZED

    format = FORMATS.get(path.rpartition(":linear_")[2].removesuffix("_per_token"))
    return format and ("sdot" if format.product.rows is QUANTIZED else "fmla")


def main() -> None:
    """Prints a line of JSON for each kernel and each CPU. AssertionError if a linear layer lacks its instruction."""
    cpus = sys.argv[1].split(",")
    initialize()
    pretend(cpus[0])
    for path in sys.argv[2:] or every_kernel():
        text = emitted(path)
        for cpu in cpus:
            num_bytes, mnemonics = assembled(text, cpu)
            assert product_of(path) in (None, *mnemonics), (path, cpu)
            print(json.dumps([path, cpu, num_bytes, mnemonics]), flush=True)


if __name__ == "__main__":
    main()
