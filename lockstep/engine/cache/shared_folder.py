"""A folder of at most so many bytes that several processes fill at once: whole files, the least recently used of which
make room.

A file is written beside its place and renamed, so that it is there whole or not at all, whatever process is killed
when. How many bytes all files have together is written in one more file, which is also the lock of this number: its
holder raises the number before a file is renamed and lowers it after files are removed, so that a process that is
killed in between leaves it too high and never too low. Listing the folder makes it exact again.
"""

import contextlib
import fcntl
import os
import re
import stat
import struct
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

LOCK, TOTAL = ".lock", struct.Struct("<QQ")  # the number of bytes, and its complement, which says that it is whole
ENTRY = re.compile(r"[0-9a-f]{64}\.\w+")  # names of files that count; any other file is left alone
MAKING, FORGOTTEN_SECONDS = ".making-", 3600  # prefix of temporary files; older ones, of killed processes, are removed
LIST_SECONDS = 600  # after which the folder is listed again, since files may also come and go by other hands
LOCK_SECONDS, PAUSE_SECONDS = 5.0, 0.002  # how long a write waits for the lock, and between two tries


class Listed(NamedTuple):
    """A file of the folder when it was listed."""

    changed_ns: int
    name: str
    num_bytes: int


class SharedFolder:
    """Writes files to a folder that exists. One thread at a time may call `put`, any thread the other methods.

    OSError, which says so, where the folder's file system has no file locks.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._oldest: deque[Listed] = deque()  # as listed last, in order of use
        self._listed = float("-inf")  # when that was
        with self._lock_file() as lock, contextlib.suppress(BlockingIOError):
            _try_lock(lock)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name now."""
        try:
            return stat.S_ISREG(os.stat(self.path / name).st_mode)
        except OSError:
            return False

    def touch(self, name: str) -> None:
        """Notes that a file was used."""
        with contextlib.suppress(OSError):
            os.utime(self.path / name)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there. Its bytes count until the folder is listed again."""
        with contextlib.suppress(OSError):
            os.unlink(self.path / name)

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> int:
        """Writes a file of these parts, whole or not at all; returns how many others had to make room. OSError if it
        cannot be written."""
        handle, beside = tempfile.mkstemp(prefix=MAKING, dir=self.path)
        try:
            with os.fdopen(handle, "wb") as out:
                for part in parts:
                    out.write(part)
                size = out.tell()
            with self._locked() as lock:
                total, num_removed = self._with_room(lock, name, size - self._size(name))
                _write_total(lock, total)
                os.replace(beside, self.path / name)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        return num_removed

    def _size(self, name: str) -> int:
        """The bytes of a file; 0 if it is not there."""
        try:
            return os.stat(self.path / name).st_size
        except OSError:
            return 0

    # ------------------------------------------------------------ with the lock

    def _with_room(self, lock: int, name: str, num_more: int) -> tuple[int, int]:
        """Removes files until the file `name`, which takes num_more bytes more than now, has room; returns the bytes of
        all files with it, and how many files were removed."""
        total, num_removed = _read_total(lock), 0
        if total is None or time.monotonic() - self._listed > LIST_SECONDS:
            total = self._list()
        while total + num_more > self.max_bytes:
            if not self._oldest:
                total = self._list()
                if total + num_more <= self.max_bytes or not self._oldest:
                    break
            file = self._oldest.popleft()
            if file.name != name and self._is_unused(file):
                self.remove(file.name)
                total, num_removed = total - file.num_bytes, num_removed + 1
        return max(0, total + num_more), num_removed

    def _is_unused(self, file: Listed) -> bool:
        """Whether a file is still there, and was not used since it was listed."""
        try:
            return os.stat(self.path / file.name).st_mtime_ns == file.changed_ns
        except OSError:
            return False

    def _list(self) -> int:
        """Lists the files in order of use and removes forgotten temporary ones; returns the bytes of all files."""
        files = []
        for file in os.scandir(self.path):
            with contextlib.suppress(OSError):
                if ENTRY.fullmatch(file.name):
                    status = file.stat()
                    files.append(Listed(status.st_mtime_ns, file.name, status.st_size))
                elif file.name.startswith(MAKING) and time.time() - file.stat().st_mtime > FORGOTTEN_SECONDS:
                    os.unlink(file.path)
        self._oldest, self._listed = deque(sorted(files)), time.monotonic()
        return sum(file.num_bytes for file in files)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Holds the lock, whose file may be read and written. OSError if it is not free within LOCK_SECONDS: its holder
        may have been stopped."""
        until = time.monotonic() + LOCK_SECONDS
        while True:
            with self._lock_file() as lock:
                try:
                    _try_lock(lock)
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise
                else:
                    if self._is_lock(lock):
                        yield lock
                        return
            time.sleep(PAUSE_SECONDS)

    def _is_lock(self, lock: int) -> bool:
        """Whether an open file is still the lock file; somebody may have removed it before it was locked."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock), os.stat(self.path / LOCK))
        return False

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[int]:
        """The lock file, open; closing it gives back the lock."""
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield lock
        finally:
            os.close(lock)


def _try_lock(lock: int) -> None:
    """Takes a lock; BlockingIOError if it is held, OSError where there are no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"its file system has no file locks: {error.strerror}") from None


def _read_total(lock: int) -> int | None:
    """The number of bytes in a lock file; None if it holds no whole number."""
    known = os.pread(lock, TOTAL.size + 1, 0)
    if len(known) != TOTAL.size:
        return None
    total, complement = TOTAL.unpack(known)
    return total if total == complement ^ (1 << 64) - 1 else None


def _write_total(lock: int, total: int) -> None:
    os.ftruncate(lock, TOTAL.size)
    os.pwrite(lock, TOTAL.pack(total, total ^ (1 << 64) - 1), 0)
