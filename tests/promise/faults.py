"""Planted faults: an op's kernel that makes one bit of one output element wrong."""

import ctypes
import dataclasses
import threading

from lockstep.runtime.step import OPERANDS

NATIVE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


class Faulty:
    """Stands in for a Kernel: runs it, and then flips the highest bit of the fourth byte of an operand.

    word: the operand's index in the op row, see `Operands.words`. The bit is a sign bit, whether the row holds float32,
    bfloat16 or int8: a smaller error might be lost, rightly, in the next rounding.
    """

    is_cached = True

    def __init__(self, kernel, word):
        self.name, self._run, self._word = f"faulty {kernel.name} {word}", NATIVE(kernel.address), word
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
                ctypes.cast(row[OPERANDS + self._word], ctypes.POINTER(ctypes.c_uint8))[3] ^= 0x80


def faulty(implementation, word):
    """The implementation with a fault in the operand of this word, an output or a cache."""
    return dataclasses.replace(implementation, kernel=Faulty(implementation.kernel, word))


def places(program, chosen):
    """[(kind of op, name of an operand, its word in the op row)] of the operands that `chosen(op)` lists, for every
    op."""
    found = {(op.kind, w.name, w.index) for op in program.ops for w in op.words() if getattr(op, w.name) in chosen(op)}
    return sorted(found, key=lambda place: (place[0], place[2]))
