"""Waiting: for a number that another thread raises, at barriers, and asleep between steps."""

import threading
import time

import numpy as np
import pytest
from numba import int64

from lockstep.native.kernel import kernel, native
from lockstep.native.machine import FOREVER, fetch_add, wait_until
from lockstep.native.simd import peek
from lockstep.runtime.executor import aligned
from lockstep.runtime.step import COUNTER, KERNEL, ROW_WORDS
from lockstep.runtime.threads import GROUP, Team, run_in_turns
from tests.runtime import order


@native
def waited(address, least, spins):
    return wait_until(address, least, spins)


@kernel
def count_threads(op, step, thread, num_threads):
    """Counts the threads that have come, and waits for all of them."""
    counter = peek(op + 8 * COUNTER, int64)
    arrived = fetch_add(counter, 1)
    wait_until(counter, (arrived // num_threads + 1) * num_threads)


@kernel
def deal(op, step, thread, num_threads):
    """Has work for the first five threads."""
    if thread < 5:
        fetch_add(step, 1)


@kernel
def claim(op, step, thread, num_threads):
    """Claims twelve tasks, the next one before each is done, so that every thread takes two numbers too many."""
    counter = peek(op + 8 * COUNTER, int64)
    number, next_number = fetch_add(counter, 1), fetch_add(counter, 1)
    while number < 12:
        number, next_number = next_number, fetch_add(counter, 1)


@pytest.mark.parametrize("num_threads", [1, 4, 64])
def test_tasks_are_counted_where_one_thread_takes_the_part_of_all(num_threads):
    table, counters = aligned(16 * ROW_WORDS).view(np.int64).reshape(2, ROW_WORDS), np.zeros(2, np.int64)
    for row, each, counter in zip(table, (deal, claim), (counters[:1], counters[1:]), strict=True):
        row[KERNEL], row[COUNTER] = each.address, counter.ctypes.data
    times, claims, step = np.zeros((2, num_threads), np.int64), np.full(2, -1), np.zeros(1, np.int64)
    run_in_turns(table.ctypes.data, 2, step.ctypes.data, num_threads, times.ctypes.data, claims.ctypes.data)
    assert claims.tolist() == [0, 12] and step[0] == min(num_threads, 5) + (num_threads <= 5) and (times > 0).all()


def test_a_wait_ends_after_its_spins():
    number = np.zeros(1, np.int64)
    assert not waited(number.ctypes.data, 1, 60) and not waited(number.ctypes.data, 1, 0)
    number[0] = 2
    assert waited(number.ctypes.data, 1, 0) and waited(number.ctypes.data, 2, 0)


def test_a_wait_ends_when_another_thread_has_raised_the_number():
    number, found = np.zeros(1, np.int64), []
    waiting = threading.Thread(target=lambda: found.append(waited(number.ctypes.data, 3, FOREVER)))
    waited(number.ctypes.data, 0, 0)  # compiled before the thread starts
    waiting.start()
    for n in (1, 2, 3):
        assert not found
        time.sleep(0.01)
        number[0] = n
    waiting.join(timeout=60)
    assert found == [True]


@pytest.mark.parametrize("num_threads", [1, 2, 5, GROUP + 1, 2 * GROUP + 3])
def test_threads_that_sleep_between_steps_come_to_each_step_once(num_threads):
    table, counter, team = aligned(16 * ROW_WORDS).view(np.int64), np.zeros(1, np.int64), Team(num_threads)
    for row in table.reshape(2, ROW_WORDS):
        row[KERNEL], row[COUNTER] = count_threads.address, counter.ctypes.data
    for step in range(1, 31):
        team.run(table.ctypes.data, 2, 0)
        assert counter[0] == 2 * num_threads * step
        if step % 10 == 0:
            time.sleep(0.05)
    team.close()


@pytest.mark.parametrize("num_threads", [3, 2 * GROUP + 1])
def test_what_threads_write_is_seen_after_they_have_met(num_threads):
    assert order.stress(9, num_threads) == 0


def test_the_stress_test_sees_a_missing_barrier():
    assert order.stress(3, 3, (order.write_and_read,)) > 0
