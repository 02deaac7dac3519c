"""This machine's ceiling: its highest memory bandwidth, and its highest rates of int8 and float32 arithmetic."""

import time
from dataclasses import dataclass

import numpy as np

from lockstep.native.kernel import kernel, target
from lockstep.native.peak import CHAINS, dot_lanes, f32_lanes, peak_f32, peak_int8
from lockstep.native.simd import lanes, load, store
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Program, Tensor
from lockstep.runtime.step_block import StepBlock
from lockstep.weights.store import WeightStore

STREAM_BYTES = 256 << 20  # well past the last-level cache
ROUNDS = 1_000_000  # milliseconds: in the first after a stream of memory int8 runs an eighth slower (study 21)
ZERO = np.float32(0)


class Work(Operands):
    """The work of one measurement. amount: bytes to read of the array at `address`, or rounds of arithmetic."""

    out: Tensor = output()
    address: int
    amount: int


@kernel
def stream(op, step, thread, num_threads):
    """Reads the thread's share of a large array."""
    work = Work.read(op)
    num_bytes = work.amount // num_threads // 1024 * 1024
    first = work.address + thread * num_bytes
    a, b, c, d = lanes(ZERO), lanes(ZERO), lanes(ZERO), lanes(ZERO)
    for i in range(first, first + num_bytes, 256):
        a, b, c, d = a + load(i), b + load(i + 64), c + load(i + 128), d + load(i + 192)
    store(work.out + 64 * thread, (a + b) + (c + d))


@kernel
def multiply_f32(op, step, thread, num_threads):
    """Chains of float32 FMAs that touch no memory."""
    work = Work.read(op)
    peak_f32(work.amount, work.out + 64 * CHAINS * thread)


@kernel
def multiply_int8(op, step, thread, num_threads):
    """Chains of dots of four int8."""
    work = Work.read(op)
    peak_int8(work.amount, work.out + 64 * CHAINS * thread)


@dataclass(frozen=True)
class Ceiling:
    """Bytes per second read from memory, int8 operations and float32 operations per second, all threads together."""

    bytes_per_second: float
    int8_per_second: float
    f32_per_second: float


class Meter:
    """Measures a team's ceilings again and again: where cores are shared, they change from minute to minute."""

    def __init__(self, team):
        self._memory, self._small = np.ones(STREAM_BYTES // 4, np.float32), np.zeros(16, np.float32)
        chains = team.num_threads * ROUNDS * CHAINS
        self._f32_operations = 2 * chains * f32_lanes(target())
        self._int8_operations = 8 * chains * dot_lanes(target())
        self._stream = _runs(team, stream, self._memory, self._memory.nbytes)
        self._int8, self._f32 = (_runs(team, k, self._small, ROUNDS) for k in (multiply_int8, multiply_f32))

    def run(self):
        """One Ceiling, of one short run of each kind."""
        return self._of(*(seconds() for seconds in (self._stream, self._int8, self._f32)))

    def best(self, num_runs=5):
        """The Ceiling of the fastest of several runs of each kind."""
        kinds = self._stream, self._int8, self._f32
        return self._of(*(min(seconds() for _ in range(num_runs)) for seconds in kinds))

    def _of(self, stream_seconds, int8_seconds, f32_seconds):
        return Ceiling(
            STREAM_BYTES / stream_seconds, self._int8_operations / int8_seconds, self._f32_operations / f32_seconds
        )


def measure(team):
    """Measures the Ceiling: the best of five short runs of each kind."""
    return Meter(team).best()


def _runs(team, kernel_, array, amount):
    """A function that runs a kernel once and returns the seconds that it took."""
    program = Program()
    out = program.tensor("out", "T", 512 * team.num_threads)
    program.emit(Work(out=out, address=array.ctypes.data, amount=amount))
    executor = Executor(program, {"work": Implementation(kernel_)}, team, WeightStore(), {"T": 1}, {})
    step = StepBlock.made(num_tokens=1)

    def seconds():
        started = time.perf_counter()
        executor.run(step)
        return time.perf_counter() - started

    return seconds
