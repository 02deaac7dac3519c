"""How the work of an op is shared among threads."""

from lockstep.native.kernel import inlined


@inlined
def dealt(total, thread, num_threads, alone):
    """The thread's tasks of so many, dealt to threads in turn. alone: the first thread does all of them."""
    if alone:
        return range(0, total if thread == 0 else 0, 1)
    return range(thread, total, num_threads)


@inlined
def contiguous(total, thread, num_threads):
    """The thread's contiguous share of so many tasks."""
    return range(total * thread // num_threads, total * (thread + 1) // num_threads)
