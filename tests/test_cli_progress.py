"""What commands say while they work."""

import io

import pytest

from lockstep.commands.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_progress(stream, monkeypatch):
    monkeypatch.setattr("lockstep.commands.progress.QUIET_SECONDS", 0)
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
