"""Progress of long work: when it is shown, and what is said."""

import contextlib
import io
import threading

import pytest

from lockstep.progress import KINDS, LINE_SECONDS, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """A clock that stands still until it is set."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_work_of_a_moment_is_silent(clock):
    stream = Terminal()
    with Progress(stream, ending="!", clock=clock) as progress:
        progress("packing", 1, 2)
        clock.now += 0.9
        progress.tick()
    assert stream.getvalue() == ""


def test_without_a_terminal_there_is_a_line_every_ten_seconds_whether_work_is_reported_or_not(clock):
    stream = io.StringIO()
    with Progress(stream, ending=", for good", clock=clock) as progress:
        progress("compiling", 0, 43)
        for seconds in range(1, 31):
            clock.now = 100 + seconds
            if seconds == 5:
                progress("compiling", 4, 43)
            progress.tick()
        progress("packing", 30_000_000, 1_500_000_000)
        progress.tick()
    assert stream.getvalue().splitlines() == [
        "compiling kernels for this CPU: 0 of 43 kernels, 1 s",
        "compiling kernels for this CPU: 4 of 43 kernels, 11 s, 107 s left",
        "compiling kernels for this CPU: 4 of 43 kernels, 21 s, 205 s left",
        "ready after 30.0 s, for good",
    ]


def test_a_terminal_has_bars_that_vanish(clock):
    stream = Terminal()
    with Progress(stream, clock=clock, detail=lambda: "at full speed") as progress:
        progress("reading", 2_000_000, 2_000_000)
        clock.now += 2
        progress("packing", 5_000_000, None)
        progress.tick()
        shown = stream.getvalue()
        clock.now += 3
        progress.tick()
    assert "reading weights" in shown and "2 of 2 MB" in shown and "0 s" in shown
    assert "packing weights" in shown and "5 MB, at full speed" in shown
    assert "3 s" in stream.getvalue()[len(shown) :]  # nothing was reported, and the clock went on
    assert stream.getvalue().endswith("\x1b[1A\x1b[2K") and "ready" not in stream.getvalue()


def test_the_clock_has_a_thread_of_its_own_which_ends_with_the_context(clock):
    lines, printed = io.StringIO(), threading.Event()
    lines.flush = printed.set
    with Progress(lines, clock=clock) as progress:
        progress("compiling", 1, 2)
        clock.now += LINE_SECONDS
        assert printed.wait(60)  # no call of progress
    progress("compiling", 2, 2)
    assert lines.getvalue() == "compiling kernels for this CPU: 1 of 2 kernels, 10 s\n"
    assert not [thread for thread in threading.enumerate() if thread.name == "lockstep progress"]


def test_an_error_has_no_last_line_and_a_closed_stream_harms_nobody(clock):
    stream, closed = io.StringIO(), io.StringIO()
    closed.close()
    with contextlib.suppress(KeyboardInterrupt), Progress(stream, ending="!", clock=clock) as progress:
        progress("packing", 1_000_000, None)
        clock.now += 2
        progress.tick()
        raise KeyboardInterrupt
    assert stream.getvalue() == "packing weights: 1 MB, 2 s\n"
    with Progress(closed, ending="!", clock=clock) as progress:
        progress("packing", 1_000_000, None)
        clock.now += 2


def test_seconds_left_are_those_of_a_part_from_its_first_step_on(clock):
    said = []
    with Progress(io.StringIO(), clock=clock) as progress:
        for seconds, part, where, done, total in (
            (100, "measuring", "plan 1 of 3", 4, 24),
            (110, "measuring", "plan 2 of 3", 8, 24),
            (130, "measuring", "plan 3 of 3", 12, 24),
            (500, "confirming", "window 1 of 9", 1, 9),
        ):
            clock.now = seconds
            progress.step(part, where, done, total)
            said += [(work.where, work.clock(seconds)) for work in progress.works]
    assert said == [
        ("plan 1 of 3", "0 s"),
        ("plan 2 of 3", "10 s, 40 s left"),
        ("plan 3 of 3", "30 s, 45 s left"),
        ("plan 3 of 3", "30 s"),
        ("window 1 of 9", "0 s"),
    ]


def test_steps_without_a_terminal_tell_the_ends_of_rounds(clock):
    stream = io.StringIO()
    with Progress(stream, clock=clock) as progress:
        progress.step("measuring", "round 1 of 2, plan 1 of 2", 1, 4)
        progress.step("measuring", "round 1 of 2, plan 2 of 2", 2, 4, True)
        count = progress.counter("scoring", "window")
        count(3, 4)
    assert (
        stream.getvalue() == "measuring: round 1 of 2, plan 2 of 2, 0 s\n"
        and progress.works[-1].where == "window 3 of 4"
    )


def test_each_kind_of_work_has_its_words_and_unit(clock):
    with Progress(io.StringIO(), clock=clock) as progress:
        for kind in KINDS:
            progress(kind, 3_000_000, None)
    assert len(progress.works) == len(KINDS) and progress.works[2].where == "3 MB"
    with pytest.raises(KeyError):
        progress("baking", 1, 2)
