"""What every run of the tests has: a budget, kernels compiled once, and a room in which a test can be alone."""

import pytest

from tests.budget import Budget
from tests.kernels import KernelsFirst
from tests.room import RoomForTests


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (Budget(), KernelsFirst(), RoomForTests()):
        config.pluginmanager.register(plugin)
