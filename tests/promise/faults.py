"""Planted faults: an op's kernel, with one bit of one output element wrong."""

import ctypes
import threading

from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import OPERANDS

NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


class Faulty:
    """Stands in for a Kernel: runs it, and then flips the highest bit of the fourth byte of operand number `output`.

    That is a sign, whether the row holds float32, bfloat16 or int8: a small error can be lost, rightly, in the next
    rounding.
    """

    is_cached = True

    def __init__(self, kernel, output):
        self.name, self._run, self._output = f"faulty {kernel.name} {output}", NATIVE(kernel.address), output
        self.function = kernel.function
        self._arrived, self._lock = 0, threading.Lock()
        self._native = NATIVE(self._run_and_flip)
        self.address = ctypes.cast(self._native, ctypes.c_void_p).value

    def _run_and_flip(self, op, step, thread, num_threads):
        self._run(op, step, thread, num_threads)
        with self._lock:
            self._arrived += 1
            if self._arrived == num_threads:
                self._arrived = 0
                row = ctypes.cast(op, ctypes.POINTER(ctypes.c_int64))
                ctypes.cast(row[OPERANDS + self._output], ctypes.POINTER(ctypes.c_uint8))[3] ^= 0x80


def faulty(implementation, output):
    """The implementation with a fault in one of its outputs, or in a cache array that is its operand of this number."""
    return Implementation(Faulty(implementation.kernel, output), implementation.layout, implementation.flushes)
