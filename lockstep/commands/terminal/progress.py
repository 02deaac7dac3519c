"""Progress on stderr: one live line on a terminal, a few plain lines elsewhere."""

import sys
import time
from typing import Self, TextIO

QUIET_SECONDS = 1.0  # work that takes less time shows no progress
PLAIN_SECONDS = 10.0  # between lines where stderr is no terminal


class Progress:
    """A context in which a model is loaded: shows the compiled kernels, and the bytes that are packed or read."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream, self._said, self._status = stream or sys.stderr, set(), None
        self._started, self._num_kernels = time.perf_counter(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._status:
            self._status.stop()
        if self._said and not any(error):
            self._print(f"ready after {self._seconds:.1f} s; later starts use what was made now")

    @property
    def _seconds(self):
        return time.perf_counter() - self._started

    def packing(self, what: str, done: int, total: int | None) -> None:
        """Shows packed or read bytes; an LLM's `progress`."""
        amount = f"{done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f}" if total else "")
        self._show(f"{what} weights", f"{amount} MB")

    def compiling(self, name: str) -> None:
        """Shows that a kernel's compilation starts; an LLM's `on_compile`."""
        self._num_kernels += 1
        self._show("compiling kernels for this CPU", f"{self._num_kernels} ({name})")

    def _show(self, what, detail) -> None:
        if self._seconds < QUIET_SECONDS:
            return
        if self._stream.isatty():
            self._said.add(what)
            self._live(f"{what}, first time only: {detail}, {self._seconds:.0f} s")
        elif what not in self._said:
            self._said.add(what)
            self._print(f"{what}, first time only")

    def _live(self, line) -> None:
        from rich.console import Console

        if self._status is None:
            self._status = Console(file=self._stream).status(line)
            self._status.start()
        self._status.update(line)

    def _print(self, line) -> None:
        print(line, file=self._stream, flush=True)


class Counter:
    """A context with a progress line for steps of one kind, with the time that is left. On a terminal it is a live
    line; elsewhere a plain line at the end of a round, and every PLAIN_SECONDS."""

    def __init__(self, doing: str = "", noun: str = "", stream: TextIO | None = None) -> None:
        self._doing, self._noun, self._stream = doing, noun, stream or sys.stderr
        self._started, self._status = time.perf_counter(), None
        self._said = self._started  # the time of the last plain line
        self._first = 0  # the work of the current part that was done when its clock started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` steps are done."""
        self._show(f"{self._doing}: {self._noun} {done} of {total}", done, total)

    def step(self, part: str, where: str, done: int, total: int, ends: bool = False) -> None:
        """Shows progress of a part of the work; each part's clock starts with its first step. where: the place in the
        part, in words; done, total: in any unit of work; ends: whether this step ends a round."""
        if part != self._doing:
            self._doing, self._started, self._first = part, time.perf_counter(), done
        self._show(f"{part}: {where}", done - self._first, total - self._first, ends)

    def _show(self, where: str, done: int, total: int, ends: bool = False) -> None:
        seconds = time.perf_counter() - self._started
        left = f", {seconds / done * (total - done):.0f} s left" if done and seconds > QUIET_SECONDS else ""
        if self._stream.isatty():
            self._live(where + left)
        elif ends or time.perf_counter() - self._said > PLAIN_SECONDS:
            self._said = time.perf_counter()
            print(where + left, file=self._stream, flush=True)

    def _live(self, line: str) -> None:
        from rich.console import Console

        if self._status is None:
            self._status = Console(file=self._stream).status(line)
            self._status.start()
        self._status.update(line)
