"""Other CPUs for which tests compile kernels, and skips where that is impossible or tests nothing new.

LOCKSTEP_ALL_TARGETS=1 (`make test-targets`) includes CPUs with the same instructions as this machine: their kernels
differ only in the order in which LLVM puts the instructions.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.native import targets
from lockstep.native.kernel import target

FEATURES = {"haswell": ("avx2", "fma"), "znver4": ("avx512f", "avx512_vnni", "avx512_bf16")}  # as Linux names them


def skip_without(*features: str) -> None:
    """Skips a test on a machine that lacks any of these CPU features."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    if missing := sorted(set(features) - set(flags)):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")


def skip_own(name: str) -> None:
    """Skips a test of a target, named as `Target` is, if it is this machine's own."""
    if name == targets.TARGET.name and not os.environ.get("LOCKSTEP_ALL_TARGETS"):
        pytest.skip(f"{name} is this machine's own target: make test-targets runs this test, too")


def compiling_for(cpu: str) -> dict[str, str]:
    """The environment of a process that compiles for a CPU of FEATURES; skips the test where that tests nothing new.

    Folders of compiled kernels are named by the target, so the process shares the cache.
    """
    skip_without(*FEATURES[cpu])
    skip_own(targets.of((target()[0], cpu, "")).name)
    return os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}


def pretending(cache: Path) -> dict[str, str]:
    """The environment of a process that makes kernels for a target it only pretends to have. The names of their folders
    do not show this, so the process gets a cache of its own."""
    return os.environ | {"LOCKSTEP_CACHE": str(cache)}


def pretend(other: targets.Target) -> None:
    """Makes every module use another target, on this machine: must be called before the modules are imported."""
    targets.TARGET = replace(other, machine=targets.ISA)
    targets.of = lambda magic: targets.TARGET


@contextlib.contextmanager
def packing_for(other: targets.Target) -> Iterator[None]:
    """Meanwhile weights are packed for another target."""
    from lockstep.formats.parts import panels

    before, panels.TARGET = panels.TARGET, other
    try:
        yield
    finally:
        panels.TARGET = before
