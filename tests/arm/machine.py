"""The emulated machine in a folder of `environment`, and the compiler for it, which runs on this one."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.new_files import scratch_folder
from tests.arm.compiler import TRIPLE
from tests.kernels import shared_kernels

ROOT = Path(__file__).parents[2]
COMPILE = ["-m", "tests.arm.compiler"]


class Machine:
    """FOLDER/python, FOLDER/compiler and FOLDER/cache. target: Numba's variables for the emulated CPU."""

    def __init__(self, folder: Path) -> None:
        self.cache = folder / "cache"
        # one core: helper processes take as long to start there as a kernel takes to compile
        self.python = ["taskset", "-c", str(min(os.sched_getaffinity(0))), str(folder / "python")]
        self.compiler = [str(folder / "compiler")]
        asked = [*self.python, "-c", "from lockstep.native.kernel import target; print(*target())"]
        triple, cpu, features = printed(asked).split()
        assert triple == TRIPLE, triple
        self.target = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}

    def compile(self, ops: Sequence[str]) -> None:
        """Compiles the kernels of ops, BACKEND:OP, on all cores of this machine. CalledProcessError if one fails."""
        cores = len(os.sched_getaffinity(0))
        variables = os.environ | self.target | {"LOCKSTEP_CACHE": str(self.cache)}
        shares = [[*self.compiler, *COMPILE, *ops[i::cores]] for i in range(cores)]
        running = [subprocess.Popen(s, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL) for s in shares]
        for share, process in zip(shares, running, strict=True):
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, share)

    def run(self, arguments: Sequence[str]) -> bool:
        """Runs Python there, to its end where Ctrl-C comes, which it hears, too. Returns whether it exited with 0."""
        variables = os.environ | {"LOCKSTEP_CACHE": str(self.cache)}
        process = subprocess.Popen([*self.python, *arguments], cwd=ROOT, env=variables)
        try:
            return process.wait() == 0
        except KeyboardInterrupt:
            process.wait()
            raise

    def words(self, arguments: Sequence[str]) -> list[str]:
        """What Python prints there. CalledProcessError where it fails."""
        return printed([*self.python, *arguments], {"LOCKSTEP_CACHE": str(self.cache)}).split()

    def digests(self, ops: Sequence[str], on: Sequence[str]) -> list[str]:
        """The digests of kernels' machine code, compiled anew by one of the two machines."""
        with scratch_folder() as cache:
            command = [*on, *COMPILE, *ops]
            return printed(command, self.target | {"LOCKSTEP_CACHE": str(cache)}).split()


def here(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What Python prints on this machine, and the ops that it ran, those of a model's self-check included."""
    with scratch_folder() as folder:
        asked, cache = folder / "asked", shared_kernels(folder / "cache")
        command = [sys.executable, "-m", "tests.arm.asked", str(asked), *arguments]
        return printed(command, {"LOCKSTEP_CACHE": str(cache)}).split(), asked.read_text().split()


def printed(command: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """What a command prints. CalledProcessError where it fails."""
    environment = os.environ | (variables or {})
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True).stdout.decode()
