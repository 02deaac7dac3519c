"""Other CPUs that tests compile for, and whether that is possible here and tells anything new.

LOCKSTEP_ALL_TARGETS=1 (`make test-targets`) also takes those that have this machine's own instructions: there the
kernels are made as they are here, only LLVM orders their instructions otherwise.
"""

import os
from pathlib import Path

import pytest

from lockstep.native import targets
from lockstep.native.kernel import target

FEATURES = {"haswell": ("avx2", "fma"), "znver4": ("avx512f", "avx512_vnni", "avx512_bf16")}  # as Linux names them


def skip_without(*features: str) -> None:
    """Skips a test on a machine that lacks any of these."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    if missing := sorted(set(features) - set(flags)):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")


def skip_own(name: str) -> None:
    """Skips a test of instructions, named as `lockstep.native.targets.name` does, that all other tests are about."""
    if name == targets.name() and not os.environ.get("LOCKSTEP_ALL_TARGETS"):
        pytest.skip(f"{name} is what this machine has: make test-targets runs this, too")


def compiling_for(cpu: str) -> dict[str, str]:
    """The environment of a process that compiles for one of FEATURES; skips the test if there is no need to.

    The folders of compiled kernels are named by the target, so it shares the cache.
    """
    skip_without(*FEATURES[cpu])
    skip_own(targets.name((target()[0], cpu, "")))
    return os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}


def pretending(cache: Path) -> dict[str, str]:
    """The environment of a process that makes kernels as if for another target: no name tells them, so its cache is
    its own."""
    return os.environ | {"LOCKSTEP_CACHE": str(cache)}
