"""Read-only maps of files whose content stays the same, even if another process writes to or truncates the file.

A map shows writes to its file, and reading a page that was cut off ends the process (SIGBUS). So a file is mapped under
a read lease (Linux, `fcntl` F_SETLEASE): the kernel holds up every process that opens the file for writing or truncates
it, and signals the holder of the lease. A copy of the file then replaces the map, at the same addresses and in one
step, and the lease is given back. Threads that read the map notice nothing.

The kernel waits for 45 s (/proc/sys/fs/lease-break-time). A process that could not make its copy in that time, because
it was stopped or out of memory, ends instead of reading the changed file.
"""

import ctypes
import fcntl
import logging
import mmap
import os
import signal
import struct
import threading
import weakref
from collections import deque
from typing import NamedTuple

import numpy as np

F_SETOWN_EX, F_OWNER_TID = 15, 0
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
PROT_NONE = 0
FAILED = ctypes.c_void_p(-1).value
log = logging.getLogger("lockstep.weights")


class _Held(NamedTuple):
    """A map: its bytes, its first byte in the file, and the file's descriptor, None once a copy has replaced it."""

    size: int
    start: int
    descriptor: int | None


class LeasedMaps:
    """Maps files under leases. A thread watches the leases, and lives as long as any of the maps."""

    def __init__(self):
        self._lock = threading.RLock()  # reentrant: a finalizer may drop a map while this thread makes another
        self._held: dict[int, _Held] = {}  # by address
        self._dropped: deque[int] = deque()  # addresses that nobody reads any more
        self._thread: threading.Thread | None = None

    @property
    def is_watching(self) -> bool:
        """Whether the watching thread runs."""
        return self._thread is not None

    def map(self, descriptor: int, start: int = 0, size: int | None = None) -> np.ndarray | None:
        """Bytes of an open file as read-only uint8 [size], mapped until the array is garbage-collected.

        start, size: which bytes; all of the file without them.

        None if there is no lease: a process has the file open for writing, it belongs to another user, it is empty, or
        the system or the file system has no leases.
        """
        if not hasattr(fcntl, "F_SETLEASE"):
            return None
        duplicate = os.dup(descriptor)
        try:
            with self._lock:
                return self._map(duplicate, start, os.fstat(duplicate).st_size - start if size is None else size)
        except OSError:
            os.close(duplicate)
            self._wake()
            return None

    def _map(self, descriptor: int, start: int, size: int) -> np.ndarray:
        fcntl.fcntl(descriptor, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, self._watcher_id()))
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        before = start % mmap.ALLOCATIONGRANULARITY  # a map begins with a page
        held = _Held(size + before, start - before, descriptor)
        address = _mmap(held.size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, held.start)
        self._held[address] = held
        memory = (ctypes.c_uint8 * held.size).from_address(address)
        # Not at the process's end, when threads may still read; the system frees the memory.
        weakref.finalize(memory, self._drop, address).atexit = False
        array = np.frombuffer(memoryview(memory), np.uint8)
        array.flags.writeable = False
        return array[before:]

    def _drop(self, address: int) -> None:
        self._dropped.append(address)
        self._wake()

    # ------------------------------------------------------------ the watching thread: only it unmaps or replaces

    def _watcher_id(self) -> int:
        """The system's id of the watching thread, which is started if there is none. Called with the lock held."""
        if self._thread is None:
            ready = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(ready,), name="lockstep leases", daemon=True)
            self._thread.start()
            ready.wait()
        assert self._thread.native_id is not None, "it has started"
        return self._thread.native_id

    def _wake(self) -> None:
        with self._lock:
            # In a forked process the thread is not alive.
            if self._thread is not None and self._thread.ident and self._thread.is_alive():
                signal.pthread_kill(self._thread.ident, signal.SIGIO)

    def _watch(self, ready: threading.Event) -> None:
        # The kernel signals this thread only; blocked, the signal is received by sigwaitinfo and interrupts nothing.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        ready.set()
        while True:
            signal.sigwaitinfo({signal.SIGIO})
            while self._dropped:
                self._unmap(self._dropped.popleft())
            for address, held in list(self._held.items()):
                if held.descriptor is not None and fcntl.fcntl(held.descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                    self._replace(address, held, held.descriptor)
            with self._lock:
                if not self._held:
                    self._thread = None
                    return

    def _unmap(self, address: int) -> None:
        held = self._held.pop(address)
        _libc().munmap(address, held.size)
        if held.descriptor is not None:
            os.close(held.descriptor)

    def _replace(self, address: int, held: _Held, descriptor: int) -> None:
        """Replaces a map by a copy, then gives the lease back, so that the file may be changed."""
        size = held.size
        try:
            copy = _mmap(size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            _read(descriptor, memoryview((ctypes.c_uint8 * size).from_address(copy)).cast("B"), held.start)
            _check(_libc().mprotect(copy, size, mmap.PROT_READ))
            _check(_libc().mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, address))
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # fails if the kernel has stopped waiting
        except OSError as error:
            # No answer is better than a wrong one: the next step that reads here ends the process.
            _libc().mprotect(address, size, PROT_NONE)
            log.critical(
                "packed weights were changed on disk before they could be copied (%s): this process ends with "
                "its next step",
                error,
            )
        self._held[address] = held._replace(descriptor=None)
        os.close(descriptor)


def _read(descriptor: int, into: memoryview, start: int) -> None:
    position = 0
    while position < len(into):
        num_read = os.preadv(descriptor, [into[position:]], start + position)
        if num_read == 0:
            raise OSError(f"the file ends after {position} of {len(into)} bytes")
        position += num_read


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return libc


def _mmap(size: int, protection: int, flags: int, descriptor: int, start: int = 0) -> int:
    return _check(_libc().mmap(None, size, protection, flags, descriptor, start))


def _check(result: int | None) -> int:
    """The result of a C call. Raises OSError if the call failed."""
    if result in (-1, FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result or 0
