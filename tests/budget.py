"""The budget of `make test`: processor time of the whole run, including the processes that it started.

A pytest plugin. It adds up the processor time of each test file, fixtures included; at the end of the run it prints the
sum, the budget if LOCKSTEP_TEST_BUDGET gives one, and the files that took most. See docs/testing.md.
"""

import os
import resource
from collections import Counter
from collections.abc import Generator

import pytest

from tests.slowness import is_within

NUM_SHOWN = 10  # files that are listed


def used_seconds() -> float:
    """Processor time (user and system) of this process and of all child processes that it has waited for."""
    whose = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in whose)  # os.times would round each down to 1/100 s


class Budget:
    """The plugin: counts in every process that runs tests, and prints in the main process."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self._counted = 0.0

    def _count(self, name: str) -> None:
        """Adds the processor time since the last call to this name."""
        now = used_seconds()
        self.files[name] += now - self._counted
        self._counted = now

    def pytest_collection_finish(self) -> None:
        self._count("(imports and collection)")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        self._count(item.nodeid.partition("::")[0])
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
            session.config.workeroutput["seconds_of_files"] = dict(self.files)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node) -> None:
        """A worker of pytest-xdist has ended."""
        self.files.update(getattr(node, "workeroutput", {}).get("seconds_of_files", {}))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in summary(used_seconds(), os.environ.get("LOCKSTEP_TEST_BUDGET"), self.files):
            terminalreporter.write_line(line, red=line.startswith("OVER"))


def summary(used: float, budget: str | None, files: dict[str, float]) -> list[str]:
    """The lines that are printed at the end of a run. used: its processor seconds; files: {name: seconds}."""
    allowed = f" of a budget of {budget}" if budget else ""
    lines = [f"{used:.0f} CPU seconds{allowed}, child processes included; most of them in"]
    largest = sorted(files.items(), key=lambda item: -item[1])[:NUM_SHOWN]
    lines += [f"{seconds:7.1f}  {name}" for name, seconds in largest]
    if budget and not is_within(used, float(budget)):
        lines.append("OVER BUDGET, even for a machine as slow as this one: see docs/testing.md")
    return lines
