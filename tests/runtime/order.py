"""The order of memory between the threads of a team, under stress: python -m tests.runtime.order [STEPS [THREADS]].

Threads write their words of an array with plain stores, meet, and look whether they see all words of all threads; words
of different threads share cache lines. Between steps the helpers are left alone for as long as they take to fall
asleep, more or less, so that steps begin while they do. A missing barrier shows as a stale word, a lost wake-up as a
step that does not end. On x86, and under QEMU on x86, the machine itself keeps stores in order: only an ARM machine can
show what is missing. `docs/design.md` argues that nothing is.
"""

import contextlib
import random
import sys
import time

import numpy as np

from lockstep.native.kernel import inlined, kernel
from lockstep.native.machine import fetch_add
from lockstep.native.numbers import int64
from lockstep.native.simd import peek, poke
from lockstep.runtime.executor import aligned
from lockstep.runtime.step import KERNEL, OPERANDS, ROW_WORDS
from lockstep.runtime.threads import Team

WORDS, ROWS = 24, 40  # of each thread; of the table, half of which write and half of which read
LONGEST_PAUSE = 2e-3  # seconds


@inlined
def write_words(op, step, thread, num_threads):
    words, value = peek(op + 8 * OPERANDS, int64), peek(step, int64) + peek(op + 8 * OPERANDS + 8, int64)
    for i in range(WORDS):
        poke(words + 8 * (num_threads * i + thread), value)


@inlined
def count_stale(op, step, num_threads):
    words, value = peek(op + 8 * OPERANDS, int64), peek(step, int64) + peek(op + 8 * OPERANDS + 8, int64)
    for i in range(WORDS * num_threads):
        if peek(words + 8 * i, int64) != value:
            fetch_add(step + 8, 1)


@kernel
def write(op, step, thread, num_threads):
    """Writes the thread's words."""
    write_words(op, step, thread, num_threads)


@kernel
def read(op, step, thread, num_threads):
    """Counts the words of all threads that are stale."""
    count_stale(op, step, num_threads)


@kernel
def write_and_read(op, step, thread, num_threads):
    """Both without a barrier between them, which is a mistake."""
    write_words(op, step, thread, num_threads)
    count_stale(op, step, num_threads)


def stress(num_steps, num_threads, kernels=(write, read)):
    """Runs some steps; returns the number of stale words that were seen."""
    words, step = np.zeros(WORDS * num_threads, np.int64), np.zeros(2, np.int64)
    table, rng = aligned(8 * ROW_WORDS * ROWS).view(np.int64).reshape(ROWS, ROW_WORDS), random.Random(0)
    for i, row in enumerate(table):
        row[KERNEL] = kernels[i % len(kernels)].address
        row[OPERANDS], row[OPERANDS + 1] = words.ctypes.data, i // len(kernels)
    with contextlib.closing(Team(num_threads)) as team:
        for i in range(1, num_steps + 1):
            step[0] = i * ROWS
            team.run(table.ctypes.data, ROWS, step.ctypes.data)
            time.sleep(rng.random() * LONGEST_PAUSE if i % 4 == 0 else 0)
    return int(step[1])


if __name__ == "__main__":
    num_steps, num_threads = (*map(int, sys.argv[1:]), *(100_000, 4)[len(sys.argv) - 1 :])
    num_stale = stress(num_steps, num_threads)
    print(f"{num_threads} threads, {num_steps} steps, {num_stale} stale words")
    sys.exit(1 if num_stale else 0)
