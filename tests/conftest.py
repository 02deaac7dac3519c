"""Registers the plugins of every test run: the budget, objects that last, kernels compiled once, tests that run
alone."""

import pytest

from lockstep.cli import heed_interrupts
from tests.budget import Budget
from tests.garbage import LastingObjects
from tests.kernels import KernelsFirst
from tests.room import RoomForTests


def pytest_configure(config: pytest.Config) -> None:
    heed_interrupts()  # some tests interrupt this process
    for plugin in (Budget(), LastingObjects(), KernelsFirst(), RoomForTests()):
        config.pluginmanager.register(plugin)
