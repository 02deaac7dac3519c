"""Bounds on processor time that hold on any machine: a slower machine is allowed more time."""

import time

USUAL_SECONDS = 0.08  # for `work` on the machine where bounds are chosen: a core of a Zen 5 server


def is_within(seconds: float, bound: float) -> bool:
    """Whether processor seconds are below a bound, or would be on the machine where the bound was chosen."""
    return seconds < bound or seconds < bound * slowness()


def slowness() -> float:
    """How many times as long `work` takes on this machine as on the machine where bounds are chosen."""
    found = []
    for _ in range(3):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return min(found) / USUAL_SECONDS


def work() -> None:
    """Work for the interpreter: lists, sorting and text."""
    made = [i * 7 % 1009 for i in range(300_000)]
    made.sort()
    "".join(map(str, made)).count("99")
