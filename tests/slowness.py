"""Bounds on processor time that hold on any machine: one that is slower than usual gets more."""

import time

USUAL_SECONDS = 0.08  # of `work`, where the bounds were chosen: a core of a Zen 5 server


def is_within(seconds: float, bound: float) -> bool:
    """Whether so many seconds on the processor are below a bound, or would be on the machine where it was chosen."""
    return seconds < bound or seconds < bound * slowness()


def slowness() -> float:
    """How many times as long this machine takes for `work` as that one."""
    found = []
    for _ in range(3):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return min(found) / USUAL_SECONDS


def work() -> None:
    """Something that takes the interpreter a while: lists, sorting and text."""
    made = [i * 7 % 1009 for i in range(300_000)]
    made.sort()
    "".join(map(str, made)).count("99")
