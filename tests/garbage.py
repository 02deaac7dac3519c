"""Garbage collection that costs a test run little: a pytest plugin.

Python looks for cycles whenever 700 more objects are alive, now and then among all objects there are. A process that
has imported Numba and collected all tests has so many that this takes 0.3 s, and a compilation makes objects fast: of
164 CPU seconds of tests that compiled kernels, 19 went there. So there are fewer collections (`tests/__init__.py`).
"""

import gc

import pytest


class LastingObjects:
    """The plugin: no collection goes through what was there before the first test."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        gc.collect()
        gc.freeze()
