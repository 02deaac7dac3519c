"""Progress of long work on standard error: bars on a terminal and in a notebook, elsewhere a plain line every 10
seconds. A thread keeps the clock going while nothing is reported."""

import contextlib
import importlib.util
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self, TextIO

OnProgress = Callable[[str, int, int | None], object]  # kind of work, done, and in all; None: not known
QUIET_SECONDS = 1.0  # work that takes less time shows nothing
LINE_SECONDS = 10.0  # between two lines, where there are no bars
TICK_SECONDS = 0.25
MAX_BARS = 5
BAR_WIDTH = 24
CLOSED = (OSError, ValueError)  # raised by a stream that nobody reads any more
MEGABYTE = 10**6


@dataclass(frozen=True)
class Kind:
    """A kind of work. words: what is shown of it. unit: what `done` and `total` count, in lots of `lot`."""

    words: str
    unit: str
    lot: int = MEGABYTE


KINDS = dict(
    downloading=Kind("downloading the model", "MB"),
    reading=Kind("reading weights", "MB"),
    packing=Kind("packing weights", "MB"),
    loading=Kind("loading packed weights", "MB"),
    compiling=Kind("compiling kernels for this CPU", "kernels", 1),
    generating=Kind("generating", "answers", 1),
    embedding=Kind("embedding", "prompts", 1),
)


@dataclass
class Work:
    """Work of one kind. began, reported: the time of the first report and of the last. first, done: how much was done
    then. total: in all. where: the place in it, in words. ended: whether all is done, or other work has begun."""

    words: str
    began: float
    reported: float
    first: int
    done: int
    total: int | None = None
    where: str = ""
    ended: bool = False

    def clock(self, now: float) -> str:
        """The seconds that the work has taken, and those that it will probably take."""
        seconds = (self.reported if self.ended else now) - self.began
        done, left = self.done - self.first, (self.total or 0) - self.done
        if self.ended or done <= 0 or left <= 0 or seconds < QUIET_SECONDS:
            return f"{seconds:.0f} s"
        return f"{seconds:.0f} s, {seconds / done * left:.0f} s left"


class Display(Protocol):
    """Shows works."""

    def is_due(self, now: float) -> bool:
        """Whether it is time to show something."""
        ...

    def show(self, works: list[Work], now: float) -> None:
        """Shows how far the works are at a time."""
        ...

    def close(self) -> None:
        """Ends the display."""
        ...


class Progress:
    """A context in which long work shows how far it is. Call it with (kind of work, done, in all), from any thread.
    Nothing is shown of work that takes less than a second.

    Kinds, and what is counted: bytes of weights in "downloading", "reading", "packing" and "loading"; kernels in
    "compiling"; answers in "generating"; prompts in "embedding". stream: standard error, if it is None. detail: returns
    words about the last kind of work, such as its speed. ending: what follows "ready after 12 s" on the last line,
    which comes if anything was shown and no error ends the context; None: no such line.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        detail: Callable[[], str] | None = None,
        ending: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ending, self._detail, self._clock = ending, detail, clock
        self._stream = sys.stderr if stream is None else stream
        self._began, self._works = clock(), dict[str, Work]()
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._ticker: threading.Thread | None = None
        self._display: Display | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
        if self._display is not None:
            with contextlib.suppress(*CLOSED):
                self._display.close()
                if self.ending is not None and not any(error):
                    seconds = self._clock() - self._began
                    print(f"ready after {seconds:.1f} s{self.ending}", file=self._stream, flush=True)

    def __call__(self, kind: str, done: int, total: int | None = None) -> None:
        """Reports that `done` of `total` are done of a kind of work, one of KINDS."""
        known = KINDS[kind]
        of = f" of {max(done, total) // known.lot:,}" if total is not None else ""
        self._report(known.words, f"{done // known.lot:,}{of} {known.unit}", done, total)

    def has(self, *kinds: str) -> bool:
        """Whether work of one of these kinds was reported."""
        return any(KINDS[kind].words in self._works for kind in kinds)

    def step(self, part: str, where: str, done: int, total: int, ends: bool = False) -> None:
        """Reports that `done` of `total` steps of a part of the work are done. where: the place in the part, in words.
        ends: whether this step ends a round, of which there is a line where there are no bars."""
        self._report(part, where, done, total)
        if ends:
            self.tick(at_once=True)

    def counter(self, part: str, noun: str) -> Callable[[int, int], None]:
        """A function (done, in all) that reports steps of a part of the work, each of which is a `noun`."""
        return lambda done, total: self.step(part, f"{noun} {done} of {total}", done, total)

    @property
    def works(self) -> list[Work]:
        """What was reported so far, in the order of the first reports."""
        with self._lock:
            return [replace(work) for work in self._works.values()]

    def _report(self, words: str, where: str, done: int, total: int | None) -> None:
        if self._closed.is_set():
            return
        now = self._clock()
        with self._lock:
            work = self._works.get(words)
            if work is None or done < work.done:  # it begins, or begins anew
                work = self._works[words] = Work(words, now, now, done, done)
            for other in self._works.values():
                other.ended = True
            work.reported, work.done, work.total, work.where = now, done, total, where
            work.ended = total is not None and done >= total
            if self._ticker is None:
                ticker = threading.Thread(target=self._tick_on, name="lockstep progress", daemon=True)
                ticker.start()
                self._ticker = ticker  # afterwards: Ctrl-C may have come while it started

    def _tick_on(self) -> None:
        with contextlib.suppress(*CLOSED):
            while not self._closed.wait(TICK_SECONDS):
                self.tick()

    def tick(self, at_once: bool = False) -> None:
        """Shows how far the work is, if that is due. at_once: a line is due, where there are no bars."""
        with self._lock:
            now, works = self._clock(), self.works
            is_brief = not works or now - works[0].began < QUIET_SECONDS
            if self._closed.is_set() or (is_brief and not at_once):
                return
            if self._display is None:
                self._display = Bars(self._stream) if shows_bars(self._stream) else Lines(self._stream)
            if at_once or self._display.is_due(now):
                works[-1].where += f", {self._detail()}" if self._detail is not None else ""
                self._display.show(works, now)


@contextlib.contextmanager
def reporting(
    progress: bool | OnProgress | None, detail: Callable[[], str] | None = None
) -> Iterator[OnProgress | None]:
    """A context with the function to which its work is reported: for True a Progress on standard error; for False or
    None, none; or the given function. ValueError for anything else."""
    if callable(progress):
        yield progress
    elif progress is True:
        with Progress(detail=detail) as shown:
            yield shown
    elif progress is False or progress is None:
        yield None
    else:
        raise ValueError(
            f"progress: expected True, False or a function (kind of work, done, in all), got {progress!r:.80}"
        )


def shows_bars(stream: TextIO) -> bool:
    """Whether a stream is a terminal, or standard error of a notebook that has widgets."""
    is_notebook = "ipykernel" in sys.modules and stream is sys.stderr
    return stream.isatty() or (is_notebook and importlib.util.find_spec("ipywidgets") is not None)


class Lines:
    """A line about the last work, every LINE_SECONDS."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, -math.inf

    def is_due(self, now: float) -> bool:
        """Whether the last line was printed LINE_SECONDS ago."""
        return now - self._last >= LINE_SECONDS

    def show(self, works: list[Work], now: float) -> None:
        """Prints a line."""
        self._last = now
        print(f"{works[-1].words}: {works[-1].where}, {works[-1].clock(now)}", file=self._stream, flush=True)

    def close(self) -> None:
        """Does nothing."""


class Bars:
    """A bar for each of the last works."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # it takes a while to import
        from rich.live import Live

        self._live = Live(console=Console(file=stream), auto_refresh=False, transient=True, redirect_stdout=False)
        self._live.start()

    def is_due(self, now: float) -> bool:
        """True: bars are drawn as often as the clock ticks."""
        return True

    def show(self, works: list[Work], now: float) -> None:
        """Draws the bars anew."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        for _ in range(4):
            table.add_column(no_wrap=True)
        shown = [(work, work.words, work.where, work.clock(now)) for work in works[-MAX_BARS:]]
        beside = sum(max(map(len, column)) + 1 for column in list(zip(*shown, strict=True))[1:])
        width = max(1, min(BAR_WIDTH, self._live.console.width - beside))
        for work, words, where, clock in shown:
            table.add_row(words, ProgressBar(work.total, work.done, width=width), where, clock)
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Removes the bars from the screen."""
        self._live.stop()
