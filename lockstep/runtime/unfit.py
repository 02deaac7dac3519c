"""What a machine cannot do, or does wrongly."""


class UnfitMachine(RuntimeError):
    """This machine cannot run the kernels, or computes other bits than they define. Its message is one sentence for a
    user, who can do something about it; it is no fault of the program."""
