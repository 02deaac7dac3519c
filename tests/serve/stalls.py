"""How long other threads cannot run while something is done."""

import contextlib
import threading
import time
from collections.abc import Iterator

BRIEF = 0.4  # seconds: twice what one call may hold Python's global lock, for machines that do more than the tests


@contextlib.contextmanager
def longest_stall() -> Iterator[list[float]]:
    """Yields a list of one number: the longest time, in seconds, in which another thread could not run since then."""
    longest, done = [0.0], threading.Event()

    def watch():
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            longest[0], last = max(longest[0], now - last), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield longest
    finally:
        done.set()
        watcher.join()
