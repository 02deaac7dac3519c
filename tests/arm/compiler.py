"""Kernels for the emulated ARM machine, compiled by this one: python -m tests.arm.compiler BACKEND:OP...

Prints each op whose kernel is not in the cache yet, with a digest of its machine code. LLVM compiles for a target,
whatever it runs on, so that the code is that of the emulated machine, byte for byte, in a tenth of the time;
FOLDER/compiler (see `environment`) runs the same Python, Numba and LLVM as FOLDER/python. The names of the CPU and its
features are those in Numba's variables. Run on the emulated machine, this compiles there, so that one can be compared
with the other.
"""

import hashlib
import importlib
import platform
import sys
from typing import Any

import llvmlite.binding as llvm

TRIPLE = "aarch64-unknown-linux-gnu"


def aim() -> None:
    """Has all of Numba's code made for ARM from now on. None of it can be run in this process."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: TRIPLE
    llvm.Target.from_default_triple = lambda: llvm.Target.from_triple(TRIPLE)


def machine_code(kernel: Any) -> str:
    """Compiles a kernel. Returns a digest of its instructions and constants.

    Other sections hold the names of symbols, in which Numba counts what a process has compiled before.
    """
    digest, library = hashlib.sha256(), kernel.compile()._library  # noqa: SLF001 Numba has no other name
    for section in llvm.ObjectFileRef.from_data(library._get_compiled_object()).sections():  # noqa: SLF001
        if section.name() in (b".text", b".rodata"):
            digest.update(section.data())
    return digest.hexdigest()[:16]


def main() -> None:
    """Compiles the kernels that are missing."""
    if platform.machine() != TRIPLE.split("-")[0]:
        aim()
    tables = importlib.import_module("lockstep.ops").BACKENDS  # not before Numba is aimed
    for op in sys.argv[1:]:
        backend, kind = op.split(":")
        if not (kernel := tables[backend][kind].kernel).is_cached:
            print(op, machine_code(kernel), flush=True)


if __name__ == "__main__":
    main()
