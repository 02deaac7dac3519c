"""macOS. See `lockstep.native.system`.

Threads sleep by __ulock_wait, which all versions have that Numba runs on, and by which libc++ waits for atomics;
os_sync_wait_on_address, its public form, came with macOS 14.4. Sleeps may be ended by signals, and early: who sleeps
looks again.
"""

import ctypes
import os

from llvmlite import ir

from lockstep.native.simd import I32, I64, call
from lockstep.native.system.other import interleave_pages as interleave_pages
from lockstep.native.system.other import interleave_thread as interleave_thread
from lockstep.native.system.other import memory_nodes as memory_nodes

CLOCK = 6
COMPARE_AND_WAIT, WAKE_ALL, NO_ERRNO = 1, 0x100, 0x1000000
USER_INITIATED = 0x19  # quality of service: results that somebody waits for


def sleep_while_equal(b, address, value):
    operation, forever = ir.Constant(I32, COMPARE_AND_WAIT | NO_ERRNO), ir.Constant(I32, 0)
    call(b, "__ulock_wait", I32, [operation, address, value, forever])


def wake(b, address, num_threads):
    """Wakes all of them: few sleep on one address."""
    operation = ir.Constant(I32, COMPARE_AND_WAIT | WAKE_ALL | NO_ERRNO)
    call(b, "__ulock_wake", I32, [operation, address, ir.Constant(I64, 0)])


def num_cores() -> int:
    """Performance cores: a step ends with the slowest thread."""
    return _number("hw.perflevel0.logicalcpu") or os.cpu_count() or 1


def _number(name: str) -> int:
    """A number that the kernel tells; 0 where it does not know the name, as on Macs whose cores are all alike."""
    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value


def prefer_fast_cores() -> None:
    ctypes.CDLL(None).pthread_set_qos_class_self_np(USER_INITIATED, 0)
