"""This machine: how many cores it has, and what it cannot do or does wrongly."""


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
