"""Tests that have the machine to themselves, though others run in other processes.

A pytest plugin. A test marked `alone` measures seconds, stalls or memory that a neighbour would change: it waits until
the tests that are running have ended, and none begins before it has ended. Without pytest-xdist nothing waits.
"""

import contextlib
import fcntl
from collections.abc import Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

MARKER = "alone: no other test runs meanwhile, in no process of this run"


class Room:
    """A room for any number of tests, or for one that is alone. folder: the same in all processes."""

    def __init__(self, folder: Path) -> None:
        self._door, self._room = folder / "door", folder / "room"

    @contextlib.contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        """While this lasts, nobody else is in the room if alone, and nobody who is alone otherwise."""
        with open(self._door, "a") as door, open(self._room, "a") as room:
            fcntl.flock(door, fcntl.LOCK_EX)  # who waits for the others to leave keeps more from coming in
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(door, fcntl.LOCK_UN)
            try:
                yield
            finally:
                fcntl.flock(room, fcntl.LOCK_UN)  # closing would not do while a forked process has the file, too


class RoomForTests:
    """The plugin. The process that was started makes the folder, the workers are told of it."""

    def __init__(self) -> None:
        self._folder: TemporaryDirectory | None = None
        self._room: Room | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", MARKER)
        if hasattr(config, "workerinput"):
            self._room = Room(Path(config.workerinput["room"]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """A worker of pytest-xdist is about to start."""
        self._folder = self._folder or TemporaryDirectory(prefix="lockstep-tests-")
        node.workerinput["room"] = self._folder.name

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        entered = self._room.entered(item.get_closest_marker("alone") is not None) if self._room else None
        with entered or contextlib.nullcontext():
            return (yield)

    def pytest_unconfigure(self) -> None:
        if self._folder:
            self._folder.cleanup()
