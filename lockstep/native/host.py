"""This machine: how many cores it has, and what it cannot do or does wrongly."""

import os


class UnfitMachine(RuntimeError):
    """This machine cannot run the kernels, or computes other bits than they define. Its message is one sentence for a
    user, who can do something about it; it is no fault of the program."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
