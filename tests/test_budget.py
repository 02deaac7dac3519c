"""The tests' own plugins: they count processor time and save some, and let a test run alone."""

import fcntl
import gc
import subprocess
import sys
import threading
import time

import pytest

from tests import OBJECTS, budget
from tests.room import Room


def test_processor_time_of_child_processes_counts():
    before = budget.used_seconds()
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-S", "-c", burn], check=True)
    assert 0.29 < budget.used_seconds() - before


@pytest.mark.parametrize("used, allowed, is_over", [(599, "600", False), (1e9, "600", True), (1e9, None, False)])
def test_a_run_over_its_budget_says_so(used, allowed, is_over):
    lines = budget.summary(used, allowed, {"a.py": 1.0, "b.py": 2.5})
    assert lines[0].startswith(f"{used:.0f} CPU seconds{' of a budget of 600' if allowed else ''}, ")
    assert lines[1].split() == ["2.5", "b.py"] and any(line.startswith("OVER") for line in lines) == is_over


def test_who_is_alone_waits_for_the_others_and_lets_nobody_in(tmp_path):
    events, threads = [], []

    def enter(name, alone):
        with Room(tmp_path).entered(alone):
            events.append(f"{name} in")
            time.sleep(0.02)
            events.append(f"{name} out")

    def start(*args):
        threads.append(threading.Thread(target=enter, args=args))
        threads[-1].start()

    def holds_the_door():
        with open(tmp_path / "door") as door:
            try:
                fcntl.flock(door, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True

    with Room(tmp_path).entered(alone=False), Room(tmp_path).entered(alone=False):
        start("alone", True)
        while not holds_the_door():
            time.sleep(0.001)
        start("late", False)
        time.sleep(0.05)
        assert events == []
    for each in threads:
        each.join(60)
    assert events == ["alone in", "alone out", "late in", "late out"]


def test_the_first_is_by_itself_and_the_others_come_together(tmp_path):
    together, done = threading.Barrier(2), []

    def enter():
        with Room(tmp_path).first_alone():
            together.wait(60)
            done.append(True)

    threads = [threading.Thread(target=enter) for _ in range(2)]
    with Room(tmp_path).first_alone():
        for each in threads:
            each.start()
        time.sleep(0.05)
        assert together.n_waiting == 0
    for each in threads:
        each.join(60)
    assert done == [True, True]


def test_garbage_is_collected_rarely_and_not_among_what_was_there_before_the_first_test():
    assert gc.isenabled() and gc.get_threshold()[0] == OBJECTS and gc.get_freeze_count() > OBJECTS
