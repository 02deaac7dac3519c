"""This machine: how many cores it has, what they can do, and what it cannot do or does wrongly."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
UNLISTED = {"asimddp": "dotprod", "i8mm": "i8mm"}  # Linux' names of what ARM's CPUs can do, and LLVM's


class UnfitMachine(RuntimeError):
    """This machine cannot run the kernels, or computes other bits than they define. Its message is one sentence for a
    user, who can do something about it; it is no fault of the program."""


def team_size(asked: int | None) -> int:
    """How many threads run where so many are asked for (None: as many as can): at most one for each core. More would
    take turns, at each of a step's hundreds of barriers; the bits are the same with any number."""
    return min(asked or num_cores(), num_cores())


def num_cores() -> int:
    """Cores that this process may compute on; of cores that differ, the fast ones where the system tells them."""
    from lockstep.native.system import SYSTEM  # which loads LLVM

    return SYSTEM.num_cores()


def unlisted_features() -> list[str]:
    """Features of this machine's CPU that LLVM has, but does not list (LLVM 22, on ARM Linux): it goes by the CPU's
    name, which it may not know, and which a virtual machine may give to a CPU that hides some of them."""
    if platform.machine() != "aarch64":
        return []
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return []
    of_cores = [set(line.partition(":")[2].split()) for line in lines if line.startswith("Features")]
    found = set.intersection(*of_cores) if of_cores else set()
    return [f"{'+' if name in found else '-'}{llvm_name}" for name, llvm_name in UNLISTED.items()] if of_cores else []
