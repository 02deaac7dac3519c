"""Measures how long a call keeps other threads from running, because it holds Python's global lock."""

import contextlib
import threading
import time
from collections.abc import Iterator

from tests.slowness import is_within

BRIEF = 0.4  # seconds: twice what one call may hold Python's global lock, for machines that do more than the tests


def is_brief(stall: float) -> bool:
    """Whether other threads may be kept waiting for so many seconds of `longest_stall`."""
    return is_within(stall, BRIEF)


@contextlib.contextmanager
def longest_stall() -> Iterator[list[float]]:
    """Yields a list of one number: the longest time, in seconds, in which another thread could not run since then.

    It is processor time of this process: whoever holds the lock uses it, and it does not pass while the machine lets
    others run. No stall is longer than the wall says, though several threads used more.
    """
    longest, done = [0.0], threading.Event()

    def watch() -> None:
        last = time.process_time(), time.perf_counter()
        while not done.wait(0.001):
            now = time.process_time(), time.perf_counter()
            longest[0], last = max(longest[0], min(now[0] - last[0], now[1] - last[1])), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield longest
    finally:
        done.set()
        watcher.join()
