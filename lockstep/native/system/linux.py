"""Linux. See `lockstep.native.system`."""

import os

from llvmlite import ir
from numba.core import cgutils

from lockstep.native.simd import I64
from lockstep.native.system.other import sleep_while_equal as look_again
from lockstep.native.targets import ISA

CLOCK = 1
WAIT, WAKE = 128, 129  # operations of a futex, of threads of one process


def sleep_while_equal(b, address, value):
    if ISA.FUTEX is None:
        look_again(b, address, value)
    else:
        _futex(b, address, WAIT, value)


def wake(b, address, num_threads):
    if ISA.FUTEX is not None:
        _futex(b, address, WAKE, num_threads)


def _futex(b, address, operation, value):
    zero, operation = ir.Constant(I64, 0), ir.Constant(I64, operation)
    syscall = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    b.call(syscall, [ir.Constant(I64, ISA.FUTEX), address, operation, value, zero, zero, zero])


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def prefer_fast_cores() -> None:
    """Linux moves threads that compute to fast cores by itself."""
