import subprocess
import sys
from pathlib import Path

from tests.ptq import grids_target
from tests.targets import compiling_for

ROOT = Path(__file__).parents[2]


def test_grids_have_the_same_bits_with_avx2():
    command = [sys.executable, "-m", "tests.ptq.grids_target"]
    done = subprocess.run(command, cwd=ROOT, env=compiling_for("haswell"), capture_output=True, text=True, check=True)
    assert dict(line.split(": ") for line in done.stdout.splitlines()) == grids_target.digests()
