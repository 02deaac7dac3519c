"""The same bits for every instruction set that this machine can run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.promise import isa
from tests.targets import FEATURES, compiling_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("cpu", FEATURES)
def test_a_target_gives_the_bits_of_this_machine(cpu):
    made = subprocess.run(
        [sys.executable, "-m", "tests.promise.isa"],
        cwd=ROOT,
        env=compiling_for(cpu),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.split() == [cpu, *isa.digests()]
