"""Compiles many kernels at once: one process for each core, each taking the next kernel that no process has taken.

LLVM has one lock in a process, so threads would not help. Kernels that a helper process took and failed to compile are
compiled by the first process. `python -m lockstep.native.compile FOLDER module:name ...` runs a helper process.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from lockstep.native.host import num_cores
from lockstep.native.kernel import Kernel, OnCompile
from lockstep.user_cache import VARIABLE, user_cache

KERNELS_PER_HELPER = 4  # at least: a helper process takes a second to start
MAX_HELPERS = 7


def compile_kernels(
    kernels: Sequence[Kernel], on_compile: OnCompile | None = None, num_processes: int | None = None
) -> None:
    """Makes sure that all kernels are compiled.

    on_compile: called, from any thread, with the name of each kernel whose compilation starts. num_processes: this one
    included; by default one for each core.
    """
    missing = list(dict.fromkeys(k for k in kernels if not k.is_cached))
    num_helpers = min((num_processes or num_cores()) - 1, len(missing) // KERNELS_PER_HELPER, MAX_HELPERS)
    if num_helpers > 0:
        with tempfile.TemporaryDirectory(prefix="lockstep-compile-") as folder:
            _share(missing, num_helpers, Path(folder), on_compile)
    for kernel in missing:
        kernel.compile(on_compile)


def _share(kernels: Iterable[Kernel], num_helpers: int, folder: Path, on_compile: OnCompile | None) -> None:
    paths = {k.path: k for k in kernels}
    command = [sys.executable, "-m", "lockstep.native.compile", str(folder), *reversed(paths)]
    environment = {**os.environ, VARIABLE: str(user_cache()), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    helpers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        for _ in range(num_helpers)
    ]
    readers = [threading.Thread(target=_report, args=(h, on_compile), daemon=True) for h in helpers]
    for reader in readers:
        reader.start()
    try:
        for path, kernel in paths.items():
            if _take(folder, path):
                kernel.compile(on_compile)
        for reader in readers:
            reader.join()
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()


def _report(helper: subprocess.Popen[str], on_compile: OnCompile | None) -> None:
    """Calls on_compile with each kernel name that a helper prints."""
    assert helper.stdout is not None
    for line in helper.stdout:
        if on_compile is not None:
            on_compile(line.strip())


def _take(folder: Path, path: str) -> bool:
    """Whether this process is the first to take a kernel: the first makes the kernel's file in the folder."""
    try:
        os.close(os.open(folder / path.replace(":", "-"), os.O_CREAT | os.O_EXCL))
        return True
    except OSError:
        return False


def main(folder: str, *paths: str) -> None:
    """A helper process: compiles the kernels that no other process has taken."""
    for path in paths:
        if _take(Path(folder), path):
            module, name = path.split(":")
            kernel: Kernel = getattr(importlib.import_module(module), name)
            kernel.compile(on_compile=lambda name: print(name, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
