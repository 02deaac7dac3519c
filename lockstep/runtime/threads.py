"""A team of threads that walk one op table together.

Every thread takes its share of each op's tiles and meets the others at a spin barrier before the next op. Between steps
the helpers spin for a moment and then sleep; a step is entered with one native call, without the interpreter.
"""

import os
import threading
import weakref

import numpy as np

from lockstep.native.kernel import inlined, native
from lockstep.native.machine import (
    FLUSH,
    IEEE,
    call_kernel,
    fetch_add,
    float_control,
    load_acquire,
    load_in_order,
    nanoseconds,
    set_float_control,
    sleep_while_equal,
    store_release,
    wait_until,
    wake,
)
from lockstep.native.numbers import int64
from lockstep.native.simd import peek, poke
from lockstep.native.system import SYSTEM
from lockstep.runtime.step import COUNTER, FLAGS, FLUSHES, GOES_ON, OWN_STEP, ROW_WORDS

LINE = 128  # bytes; each shared word has a cache line of its own, where lines are of 64 bytes a pair of them
GENERATION, ARRIVED, PASSED, SLEEPERS, QUIT = (i * LINE for i in range(5))
TABLE, NUM_OPS, STEP, CLOCK = (5 * LINE + 8 * i for i in range(4))
GROUPS = 6 * LINE  # two words for each group of threads, as ARRIVED and PASSED are for all
SPINS_BEFORE_SLEEP = 2000
# Threads add to ARRIVED one after the other, since its cache line goes from core to core. Where there are more threads
# than this, groups of so many meet apart, and the last of each meets those of the other groups: of 64 threads no line
# goes to more than 8 cores.
GROUP = 8
LOW_HALF = (1 << 32) - 1  # of an op's counter: the upper half may count something else than claims


def shared_bytes(num_threads):
    """Bytes of the words that a team of num_threads shares."""
    return GROUPS + 2 * LINE * (-(-num_threads // GROUP))


@native
def meet(shared, thread, num_threads):
    """Spin barrier."""
    if num_threads <= GROUP:
        if num_threads > 1 and is_last(shared + ARRIVED, shared + PASSED, num_threads):
            fetch_add(shared + PASSED, 1)
        return
    group = thread // GROUP
    arrived = shared + GROUPS + 2 * LINE * group
    if is_last(arrived, arrived + LINE, min(GROUP, num_threads - GROUP * group)):
        if is_last(shared + ARRIVED, shared + PASSED, (num_threads + GROUP - 1) // GROUP):
            fetch_add(shared + PASSED, 1)
        fetch_add(arrived + LINE, 1)


@inlined
def is_last(arrived, passed, count):
    """Whether the calling thread is the last of `count` that call this, and has to add 1 to the word at `passed`, for
    which the others wait here."""
    before = load_acquire(passed)
    if fetch_add(arrived, 1) == count - 1:
        store_release(arrived, 0)
        return True
    wait_until(passed, before + 1)
    return False


@inlined
def run_op(row, flags, step, thread, num_threads):
    """One thread's share of an op."""
    if flags & FLUSHES:
        set_float_control(FLUSH)
    own = peek(row + 8 * OWN_STEP, int64)
    call_kernel(peek(row, int64), row, own if own != 0 else step, thread, num_threads)
    if flags & FLUSHES:
        set_float_control(IEEE)


@native
def run_ops(shared, thread, num_threads):
    """One thread's walk through the table of the current step."""
    table, num_ops = peek(shared + TABLE, int64), peek(shared + NUM_OPS, int64)
    step, clock = peek(shared + STEP, int64), peek(shared + CLOCK, int64)
    before = float_control()
    set_float_control(IEEE)
    for i in range(num_ops):
        row = table + 8 * ROW_WORDS * i
        flags = peek(row + 8 * FLAGS, int64)
        run_op(row, flags, step, thread, num_threads)
        if flags & GOES_ON == 0 or clock != 0 or i == num_ops - 1:
            meet(shared, thread, num_threads)
        if clock != 0 and thread == 0:
            poke(clock + 8 * i, nanoseconds())
    set_float_control(before)


@native
def run_step(shared, table, num_ops, step, clock, num_threads):
    """Runs one step on the whole team; returns when every thread is done."""
    poke(shared + TABLE, table)
    poke(shared + NUM_OPS, num_ops)
    poke(shared + STEP, step)
    poke(shared + CLOCK, clock)
    fetch_add(shared + GENERATION, 1)
    if load_in_order(shared + SLEEPERS) > 0:  # a helper has seen the new generation, or is counted here
        wake(shared + GENERATION, num_threads)
    run_ops(shared, 0, num_threads)


@native
def help_forever(shared, thread, num_threads, generation):
    """The loop of a helper thread: wait for the next generation, walk the table of its step; ends when QUIT is set."""
    while True:
        if not wait_until(shared + GENERATION, generation + 1, SPINS_BEFORE_SLEEP):
            fetch_add(shared + SLEEPERS, 1)
            while load_in_order(shared + GENERATION) == generation:
                sleep_while_equal(shared + GENERATION, generation & 0xFFFFFFFF)
            fetch_add(shared + SLEEPERS, -1)
        generation += 1
        if load_acquire(shared + QUIT) != 0:
            return
        run_ops(shared, thread, num_threads)


@native
def run_in_turns(table, num_ops, step, num_threads, times, claims):
    """Runs a step on the calling thread alone, which takes the part of each of num_threads threads in turn.

    times: int64[num_ops, num_threads], nanoseconds of each thread's share of an op. claims: int64[num_ops], how many
    tasks of an op its threads claimed by the op's counter; 0 where their shares are dealt. The first thread claims all
    of them, so of these ops only the sum of the times means something. A thread that comes once more finds nothing left
    to claim: by how much it raises the counter, all others have raised it beside their claims.
    """
    before = float_control()
    set_float_control(IEEE)
    for i in range(num_ops):
        row = table + 8 * ROW_WORDS * i
        flags, counter = peek(row + 8 * FLAGS, int64), peek(row + 8 * COUNTER, int64)
        first, start = peek(counter, int64), nanoseconds()
        for thread in range(num_threads):
            run_op(row, flags, step, thread, num_threads)
            now = nanoseconds()
            poke(times + 8 * (num_threads * i + thread), now - start)
            start = now
        raised = (peek(counter, int64) - first) & LOW_HALF
        run_op(row, flags, step, num_threads - 1, num_threads)
        once_more = ((peek(counter, int64) - first) & LOW_HALF) - raised
        poke(claims + 8 * i, raised - num_threads * once_more)
    set_float_control(before)


class Team:
    """num_threads threads, the caller's included; a forked process gets its own. `close` ends the helpers."""

    def __init__(self, num_threads):
        self.num_threads = num_threads
        self._start()

    def _start(self):
        self._process, memory = os.getpid(), np.zeros(shared_bytes(self.num_threads) + LINE, np.uint8)
        self._shared = -(-memory.ctypes.data // LINE) * LINE
        self._helpers = [
            threading.Thread(target=_live, args=(memory, self._shared, i, self.num_threads), daemon=True)
            for i in range(1, self.num_threads)
        ]
        for helper in self._helpers:
            helper.start()
        SYSTEM.prefer_fast_cores()  # the thread that makes a team usually runs its steps, too
        self._memory = memory
        self._end = weakref.finalize(self, _quit, self._shared, self.num_threads)  # a team that is dropped ends, too

    def run(self, table, num_ops, step, clock=0):
        """Runs num_ops rows of a table on a step block; returns when all threads are done. RuntimeError once closed.

        table, step: addresses. clock: address of int64[num_ops] for the time when each op ended, or 0.
        """
        if not self._end.alive:
            raise RuntimeError("the threads are closed: nothing can run any more")
        if self._process != os.getpid():  # helpers do not survive a fork
            self._end.detach()
            self._start()
        if num_ops:  # an empty table has no barrier at its end
            run_step(self._shared, table, num_ops, step, clock, self.num_threads)

    def close(self):
        self._end()
        for helper in self._helpers:
            helper.join()
        self._helpers = []


def _live(memory, shared, thread, num_threads):
    """What a helper thread runs; it holds a reference to the memory that it watches."""
    SYSTEM.prefer_fast_cores()
    help_forever(shared, thread, num_threads, 0)


@native
def _quit(shared, num_threads):
    store_release(shared + QUIT, 1)
    fetch_add(shared + GENERATION, 1)
    wake(shared + GENERATION, num_threads)
