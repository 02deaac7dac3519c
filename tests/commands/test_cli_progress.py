"""The progress lines of commands."""

import io

import pytest

from lockstep.commands.terminal import progress as module
from lockstep.commands.terminal.progress import Counter, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_progress(stream, monkeypatch):
    monkeypatch.setattr("lockstep.commands.terminal.progress.QUIET_SECONDS", 0)
    with Progress(stream) as progress:
        progress.packing("packing", 5_000_000, None)
        progress.compiling("one")
        progress.compiling("two")
    said = stream.getvalue()
    assert "compiling kernels for this CPU, first time only" in said and "ready after" in said
    assert ("2 (two)" in said) == stream.isatty() != ("packing weights, first time only\n" in said)


def test_progress_of_a_moment_is_silent():
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.packing("packing", 1, None)
    assert stream.getvalue() == ""


def test_time_left_is_that_of_a_part_from_its_first_step_on(monkeypatch):
    now = iter([0.0, 100.0, 100.0, 110.0, 110.0, 130.0, 500.0, 500.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    said = []
    with Counter(stream=Terminal()) as counter:
        monkeypatch.setattr(counter, "_live", said.append)
        counter.step("measuring", "plan 1 of 3", 4, 24)
        counter.step("measuring", "plan 2 of 3", 8, 24)
        counter.step("measuring", "plan 3 of 3", 12, 24)
        counter.step("confirming", "window 1 of 9", 1, 9)
    assert said == [
        "measuring: plan 1 of 3",
        "measuring: plan 2 of 3, 40 s left",
        "measuring: plan 3 of 3, 15 s left",
        "confirming: window 1 of 9",
    ]


def test_a_counter_without_a_terminal_tells_the_ends_of_rounds():
    stream = io.StringIO()
    with Counter(stream=stream) as counter:
        counter.step("measuring", "round 1 of 2, plan 1 of 2", 1, 4)
        counter.step("measuring", "round 1 of 2, plan 2 of 2", 2, 4, True)
    assert stream.getvalue() == "measuring: round 1 of 2, plan 2 of 2\n"
