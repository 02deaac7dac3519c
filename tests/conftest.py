"""Registers the plugins of every test run: the budget, rare collections of garbage, kernels compiled once, and tests
that run alone."""

import pytest

from tests.budget import Budget
from tests.garbage import RareGarbage
from tests.kernels import KernelsFirst
from tests.room import RoomForTests


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (Budget(), RareGarbage(), KernelsFirst(), RoomForTests()):
        config.pluginmanager.register(plugin)
