"""Garbage collection that costs a test run little: a pytest plugin.

Python looks for cycles whenever 700 more objects are alive, now and then among all objects there are. A process that
has imported Numba and collected all tests has so many that this takes 0.3 s, and a compilation makes objects fast: of
164 CPU seconds of tests that compiled kernels, 19 went there.
"""

import gc

import pytest

from lockstep.native.compile import OBJECTS


class RareGarbage:
    """The plugin: fewer collections, and none that goes through what was there before the first test."""

    def pytest_sessionstart(self) -> None:
        gc.set_threshold(OBJECTS)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        gc.collect()
        gc.freeze()
