"""Runs a Python module on this machine and writes down which kernels it asked for, in a file, one word a line:

    python -m tests.arm.asked FILE -m MODULE ARGUMENT...

A word is BACKEND:OP, since one op may have another kernel on another target.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from lockstep.native.kernel import Kernel, OnCompile
from lockstep.ops import BACKENDS


def ops_of(kernels: set[str]) -> list[str]:
    """The BACKEND:OP that have the kernels with these paths."""
    ops = [(backend, kind, op) for backend, table in BACKENDS.items() for kind, op in table.items()]
    return [f"{backend}:{kind}" for backend, kind, op in ops if op.kernel.path in kernels]


def main() -> None:
    """Runs the module as Python itself would, also where it exits."""
    file, minus_m, module, *arguments = sys.argv[1:]
    assert minus_m == "-m", minus_m
    asked: set[str] = set()
    compile_kernel = Kernel.compile

    def noted(self: Kernel, on_compile: OnCompile | None = None) -> Any:
        asked.add(self.path)
        return compile_kernel(self, on_compile)

    Kernel.compile = noted
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        Path(file).write_text("".join(f"{word}\n" for word in ops_of(asked)))


if __name__ == "__main__":
    main()
