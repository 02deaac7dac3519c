"""This machine: how many cores it has, and what it cannot do or does wrongly."""


class UnfitMachine(RuntimeError):
    """This machine cannot run the kernels, or computes other bits than they define. Its message is one sentence for a
    user, who can do something about it; it is no fault of the program."""


def num_cores() -> int:
    """Cores that this process may compute on; of cores that differ, the fast ones where the system tells them."""
    from lockstep.native.system import SYSTEM  # which loads LLVM

    return SYSTEM.num_cores()
