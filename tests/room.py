"""What the workers of pytest-xdist do not do at the same time: tests that run alone, and rewriting of test modules.

A pytest plugin. A test marked `alone` measures seconds, stalls or memory, which other tests would change: it waits
until all running tests have ended, and no test begins before it has ended. Without pytest-xdist no test waits.

Where Python may write .pyc files, the workers collect the tests after one of them has: pytest rewrites all test modules
for the first one, and the others load what it wrote.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from lockstep.new_files import scratch_folder

MARKER = "alone: no other test runs at the same time in any process of this run"


class Room:
    """A lock that any number of tests share, or that one test holds alone. folder: the same in all processes."""

    def __init__(self, folder: Path) -> None:
        self._door, self._room, self._collected = (folder / name for name in ("door", "room", "collected"))

    @contextlib.contextmanager
    def entered(self, alone: bool) -> Iterator[None]:
        """A context: if alone, no other test is in the room; otherwise no test that is alone."""
        with open(self._door, "a") as door, open(self._room, "a") as room:
            fcntl.flock(door, fcntl.LOCK_EX)  # a test that waits to be alone keeps the others from entering
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(door, fcntl.LOCK_UN)
            try:
                yield
            finally:
                fcntl.flock(room, fcntl.LOCK_UN)  # closing is not enough while a forked process holds the file

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context: the first to enter is in it by itself; the others enter, together, when the first has left."""
        with open(self._collected, "a") as collected:
            fcntl.flock(collected, fcntl.LOCK_EX)
            if os.fstat(collected.fileno()).st_size == 0:
                yield
                collected.write("by the first")
                return
        yield


class RoomForTests:
    """The plugin: the main process makes the folder of the locks, and passes its name to the workers."""

    def __init__(self) -> None:
        self._folder, self._ending = None, contextlib.ExitStack()
        self._room: Room | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        config.addinivalue_line("markers", MARKER)
        if hasattr(config, "workerinput"):
            self._room = Room(Path(config.workerinput["room"]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """A worker of pytest-xdist is about to start."""
        self._folder = self._folder or self._ending.enter_context(scratch_folder())
        node.workerinput["room"] = str(self._folder)

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        alone = self._room.first_alone() if self._room and not sys.dont_write_bytecode else None
        with alone or contextlib.nullcontext():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        entered = self._room.entered(item.get_closest_marker("alone") is not None) if self._room else None
        with entered or contextlib.nullcontext():
            return (yield)

    def pytest_unconfigure(self) -> None:
        self._ending.close()
