"""Compiles many kernels at once: one process for each core, each given the next kernel that no process has.

LLVM has one lock in a process, so threads would not help. Kernels that a helper process was given and failed to compile
are compiled by the first process. `python -m lockstep.native.compile` runs a helper process: it reads the kernels'
paths from standard input, and ends at once when that is closed, as it is by the end of the first process, however that
ends.
"""

import contextlib
import gc
import importlib
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from lockstep.native.host import num_cores
from lockstep.native.kernel import Kernel, OnCompile
from lockstep.user_cache import VARIABLE, has_room, user_cache

KERNELS_PER_HELPER = 4  # at least: a helper process takes a second to start
MAX_HELPERS = 7
KERNEL_BYTES = 200_000  # that a kernel takes on disk; most take less
OBJECTS = 50_000  # that a helper makes between two collections of garbage, in place of 700: it costs 20 MB
DONE = "\n"  # a helper's line after each kernel; a line with a name says that a compilation starts


def compile_kernels(
    kernels: Sequence[Kernel], on_compile: OnCompile | None = None, num_processes: int | None = None
) -> None:
    """Makes sure that all kernels are compiled.

    on_compile: called, from any thread, with the name of each kernel whose compilation starts. num_processes: this one
    included; by default one for each core, and this one alone where the cache folder, through which processes hand over
    their kernels, has no room or cannot be written.
    """
    missing = list(dict.fromkeys(k for k in kernels if not k.is_cached))
    num_helpers = min((num_processes or num_cores()) - 1, len(missing) // KERNELS_PER_HELPER, MAX_HELPERS)
    if num_helpers > 0 and has_room(user_cache(), len(missing) * KERNEL_BYTES):
        _share(missing, num_helpers, on_compile)
    for kernel in missing:
        kernel.compile(on_compile)


def _share(kernels: Iterable[Kernel], num_helpers: int, on_compile: OnCompile | None) -> None:
    """Compiles kernels together with helper processes: this one from the first on, the helpers from the last."""
    left = deque(kernels)
    helpers = [_start() for _ in range(num_helpers)]
    feeders = [threading.Thread(target=_feed, args=(h, left, on_compile), daemon=True) for h in helpers]
    for feeder in feeders:
        feeder.start()
    try:
        while (kernel := _taken(left.popleft)) is not None:
            kernel.compile(on_compile)
        for feeder in feeders:
            feeder.join()
    finally:
        for helper in helpers:
            helper.kill()
            helper.wait()


def _taken(take: Callable[[], Kernel]) -> Kernel | None:
    """The kernel that an end of the deque gives; None if there is none left."""
    try:
        return take()
    except IndexError:
        return None


def _start() -> subprocess.Popen[str]:
    """A helper process, which waits for the path of a kernel."""
    environment = {**os.environ, VARIABLE: str(user_cache()), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep.native.compile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _feed(helper: subprocess.Popen[str], left: deque[Kernel], on_compile: OnCompile | None) -> None:
    """Gives a helper one kernel after another, until none is left or the helper has ended."""
    assert helper.stdin is not None and helper.stdout is not None
    with contextlib.suppress(OSError):  # it has ended
        while (kernel := _taken(left.pop)) is not None:
            helper.stdin.write(f"{kernel.path}\n")
            helper.stdin.flush()
            while (line := helper.stdout.readline()) != DONE:
                if not line:
                    return
                if on_compile is not None:
                    on_compile(line.strip())


def main() -> None:
    """A helper process: compiles the kernels whose paths it reads."""
    gc.set_threshold(OBJECTS)  # a twelfth of a compilation's time went into looking for cycles among all objects
    paths: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(paths,), daemon=True).start()
    while True:
        module, name = paths.get().split(":")
        kernel: Kernel = getattr(importlib.import_module(module), name)
        kernel.compile(on_compile=lambda name: print(name, flush=True))
        print(end=DONE, flush=True)


def _read(paths: queue.SimpleQueue[str]) -> None:
    """Reads paths from standard input. At its end the process ends, even in the middle of a compilation."""
    for line in sys.stdin:
        paths.put(line.strip())
    os._exit(0)


if __name__ == "__main__":
    main()
