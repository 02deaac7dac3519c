"""Read-only maps of files that stay as they are, whatever is done to the files.

A map shows what others write to its file, and touching a page that was cut off ends the process (SIGBUS). So a file is
mapped under a read lease (Linux, `fcntl` F_SETLEASE): whoever opens it for writing, or cuts it, is held up by the
kernel, which tells the holder of the lease. A copy of the file then takes the place of the map, at the same addresses
and in one step, and the lease is given back. Threads that read the map notice nothing.

The kernel waits for 45 s (/proc/sys/fs/lease-break-time). A process that could not make its copy in that time, since it
was stopped, or has no memory left, ends instead of reading what the file has become.
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

import numpy as np

F_SETOWN_EX, F_OWNER_TID = 15, 0
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
PROT_NONE = 0
FAILED = ctypes.c_void_p(-1).value
log = logging.getLogger("lockstep.weights")


class LeasedMaps:
    """Maps files under leases, and watches over them in a thread of its own, which lives as long as any of the maps."""

    def __init__(self):
        self._lock = threading.RLock()  # a map may be given up in the midst of making another
        self._held: dict[int, tuple[int, int | None]] = {}  # address: (size, descriptor, or None after the copy)
        self._dropped: deque[int] = deque()  # addresses that nobody reads any more
        self._thread: threading.Thread | None = None

    @property
    def is_watching(self) -> bool:
        """Whether the thread that watches over maps runs."""
        return self._thread is not None

    def map(self, descriptor: int) -> np.ndarray | None:
        """The whole of an open file as read-only uint8 [size], for as long as it is used.

        None where no lease is to be had: somebody has the file open for writing, it belongs to somebody else, it is
        empty, or the system or the file system has no leases.
        """
        if not hasattr(fcntl, "F_SETLEASE"):
            return None
        own = os.dup(descriptor)
        try:
            with self._lock:
                return self._map(own)
        except OSError:
            os.close(own)
            self._wake()
            return None

    def _map(self, own: int) -> np.ndarray:
        fcntl.fcntl(own, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, self._watcher_id()))
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        size = os.fstat(own).st_size
        address = _mmap(size, mmap.PROT_READ, mmap.MAP_SHARED, own)
        self._held[address] = size, own
        memory = (ctypes.c_uint8 * size).from_address(address)
        # At the process's end threads may still read; the system takes the memory back.
        weakref.finalize(memory, self._drop, address).atexit = False
        array = np.frombuffer(memoryview(memory), np.uint8)
        array.flags.writeable = False
        return array

    def _drop(self, address: int) -> None:
        self._dropped.append(address)
        self._wake()

    # ------------------------------------------------------------ the watcher: the only one who unmaps or replaces

    def _watcher_id(self) -> int:
        """The system's number of the watching thread, which is started if there is none. With the lock held."""
        if self._thread is None:
            ready = threading.Event()
            self._thread = threading.Thread(target=self._watch, args=(ready,), name="lockstep leases", daemon=True)
            self._thread.start()
            ready.wait()
        assert self._thread.native_id is not None, "it has started"
        return self._thread.native_id

    def _wake(self) -> None:
        with self._lock:
            # In a copy of the process the thread is not alive.
            if self._thread is not None and self._thread.ident and self._thread.is_alive():
                signal.pthread_kill(self._thread.ident, signal.SIGIO)

    def _watch(self, ready: threading.Event) -> None:
        # The kernel tells this thread alone, which takes the signal as an answer and not as an interruption.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        ready.set()
        while True:
            signal.sigwaitinfo({signal.SIGIO})
            while self._dropped:
                self._unmap(self._dropped.popleft())
            for address, (size, descriptor) in list(self._held.items()):
                if descriptor is not None and fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
                    self._replace(address, size, descriptor)
            with self._lock:
                if not self._held:
                    self._thread = None
                    return

    def _unmap(self, address: int) -> None:
        size, descriptor = self._held.pop(address)
        _libc().munmap(address, size)
        if descriptor is not None:
            os.close(descriptor)

    def _replace(self, address: int, size: int, descriptor: int) -> None:
        """Puts a copy in the place of a map, then lets those go on who want to change the file."""
        try:
            copy = _mmap(size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
            _read(descriptor, memoryview((ctypes.c_uint8 * size).from_address(copy)).cast("B"))
            _check(_libc().mprotect(copy, size, mmap.PROT_READ))
            _check(_libc().mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, address))
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # fails where the kernel did not wait any longer
        except OSError as error:
            # Rather no answer than a wrong one: the next step that reads here ends the process.
            _libc().mprotect(address, size, PROT_NONE)
            log.critical(
                "packed weights were changed on disk before they could be copied (%s): this process ends with "
                "its next step",
                error,
            )
        self._held[address] = size, None
        os.close(descriptor)


def _read(descriptor: int, into: memoryview) -> None:
    position = 0
    while position < len(into):
        count = os.preadv(descriptor, [into[position:]], position)
        if count == 0:
            raise OSError(f"the file ends after {position} of {len(into)} bytes")
        position += count


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return libc


def _mmap(size: int, protection: int, flags: int, descriptor: int) -> int:
    return _check(_libc().mmap(None, size, protection, flags, descriptor, 0))


def _check(result: int | None) -> int:
    """What a call returned. Raises OSError if it failed."""
    if result in (-1, FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result or 0
