"""How the work of an op is shared among threads."""

import itertools

import pytest

from lockstep.ops.share import neighbouring


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 8, 24, 25])
def test_claims_in_turn_are_each_task_once_and_neighbours_for_a_thread(num_tasks, num_threads):
    tasks = [neighbouring.py_func(n, num_tasks, num_threads) for n in range(num_tasks)]
    assert sorted(tasks) == list(range(num_tasks))
    for thread in range(num_threads):
        own = tasks[thread::num_threads]
        assert all(after == task + 1 for task, after in itertools.pairwise(own))
