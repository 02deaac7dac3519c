"""The same bits for every instruction set that this machine can run."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TARGETS = {"haswell": ("avx2", "fma"), "znver4": ("avx512f", "avx512_vnni", "avx512_bf16")}


def cpu_flags():
    """Features of this machine as Linux names them; none elsewhere."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def digest(**target):
    """[CPU, digests...] that tests.promise.isa prints in a process of its own."""
    made = subprocess.run(
        [sys.executable, "-m", "tests.promise.isa"],
        cwd=ROOT,
        env={**os.environ, **target},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout.split()


@pytest.fixture(scope="module")
def host():
    return digest()[1:]


@pytest.mark.parametrize("cpu", TARGETS)
def test_a_target_gives_the_bits_of_this_machine(cpu, host):
    missing = set(TARGETS[cpu]) - cpu_flags()
    if missing:
        pytest.skip(f"this CPU cannot run {cpu}: it lacks {', '.join(sorted(missing))}")
    assert digest(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="") == [cpu, *host]
