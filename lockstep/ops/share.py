"""How the work of an op is shared among threads."""

from lockstep.native.kernel import inlined


@inlined
def strided(num_tasks, thread, num_threads, one_thread):
    """The thread's share of num_tasks dealt to threads in turn. one_thread: the first thread has all of them."""
    if one_thread:
        return range(0, num_tasks if thread == 0 else 0, 1)
    return range(thread, num_tasks, num_threads)


@inlined
def neighbouring(number, num_tasks, num_threads):
    """The task of the claim with a number. Threads that claim in turn walk through neighbouring tasks each, so that
    what is prefetched where a task ends is what the same thread reads next."""
    turn, thread = number // num_threads, number % num_threads
    return num_tasks // num_threads * thread + min(thread, num_tasks % num_threads) + turn


@inlined
def contiguous(num_tasks, thread, num_threads):
    """The thread's share of num_tasks cut into one run for each thread."""
    return range(num_tasks * thread // num_threads, num_tasks * (thread + 1) // num_threads)
