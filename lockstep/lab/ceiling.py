"""This machine's ceiling: its highest memory bandwidth, and its highest rates of int8 and float32 arithmetic."""

import time
from dataclasses import dataclass

import numpy as np

from lockstep.native.kernel import kernel, target
from lockstep.native.peak import CHAINS, lanes_per_register, peak_f32, peak_int8
from lockstep.native.simd import lanes, load, store
from lockstep.runtime.backend import Implementation
from lockstep.runtime.executor import Executor
from lockstep.runtime.operands import Operands, output
from lockstep.runtime.program import Program, Tensor
from lockstep.runtime.step_block import StepBlock
from lockstep.weights.store import WeightStore

STREAM_BYTES = 256 << 20  # well past the last-level cache
ROUNDS = 200_000
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


def measure(team):
    """Measures the Ceiling: the best of five short runs of each kind."""
    memory, small = np.ones(STREAM_BYTES // 4, np.float32), np.zeros(16, np.float32)
    work = team.num_threads * ROUNDS * 2 * CHAINS * lanes_per_register(target())
    return Ceiling(
        STREAM_BYTES / _seconds(team, stream, memory, memory.nbytes),
        4 * work / _seconds(team, multiply_int8, small, ROUNDS),
        work / _seconds(team, multiply_f32, small, ROUNDS),
    )


def _seconds(team, kernel_, array, amount):
    program = Program()
    out = program.tensor("out", "T", 512 * team.num_threads)
    program.emit(Work(out=out, address=array.ctypes.data, amount=amount))
    executor = Executor(program, {"work": Implementation(kernel_)}, team, WeightStore(), {"T": 1}, {})
    step, times = StepBlock.made(num_tokens=1), []
    for _ in range(5):
        started = time.perf_counter()
        executor.run(step)
        times.append(time.perf_counter() - started)
    return min(times)
