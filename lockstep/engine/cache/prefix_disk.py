"""The prefix cache on disk: pages and states as files, which outlive the process and may be shared by several
processes.

An entry is a file named by the model's content hash and its block's name: a header (magic, kind, name, length,
checksum) and the bytes. Until the content hash is known, entries wait in memory. An entry is written to a temporary
file and renamed, so that it is there whole or not at all. An entry that does not fit its header is removed and counted,
never used. The checksum finds damage, not malice: whoever may write to the folder may change what the model sees.
"""

import contextlib
import functools
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from lockstep.user_cache import NotPrivate, make_private
from lockstep.weights.content import ContentHash

MAGIC, HEADER = b"lockstep cache 1", struct.Struct("<16s8s32sQ16s")
MAKING, FORGOTTEN_SECONDS = ".making-", 3600  # prefix of temporary files; older ones, of killed processes, are removed
GRACE_SECONDS = 2  # how long `close` waits for the content hash, if an entry is to be written
WAIT_SECONDS = 0.05  # between two checks whether the content hash is known
RESCAN = 64  # writes after which the folder is listed again: other processes write to it, too


@dataclass
class DiskCounts:
    """Entries so far. damaged: not as their header says, or unreadable. skipped: not written, since too many waited,
    the disk was full, or the content hash was not known in time."""

    written: int = 0
    loaded: int = 0
    damaged: int = 0
    skipped: int = 0
    evicted: int = 0


class DiskStore:
    """Entries of several kinds in a folder of at most `max_bytes`; the least recently used (by file time) make room.

    sizes: {kind: bytes of an entry}, of the pages of each group (`prefix.page_kind`) and of states. content: the
    model's ContentHash. A thread of its own writes; up to `max_pending` bytes wait for it. ValueError for a folder that
    cannot be made or written, or to which other users can write.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        max_bytes: int,
        sizes: Mapping[str, int],
        content: ContentHash,
        max_pending: int = 256 << 20,
    ) -> None:
        self.folder, self.max_bytes, self.sizes, self.max_pending = Path(folder), max_bytes, sizes, max_pending
        self.counts, self._lock, self._content = DiskCounts(), threading.Lock(), content
        self._pending: dict[tuple[str, bytes], np.ndarray] = {}  # by kind and name
        self._queue: SimpleQueue = SimpleQueue()
        self._closing = threading.Event()
        try:
            self.folder = make_private(self.folder.absolute())
            with tempfile.TemporaryFile(dir=self.folder):
                self._scan()
        except NotPrivate as error:
            raise ValueError(f"cache_dir: {error}") from None
        except OSError as error:
            raise ValueError(f"cache_dir {str(folder)!r}: cannot be written ({error.strerror or error})") from None
        self._writer = threading.Thread(target=self._write_all, name="lockstep prefix writer", daemon=True)
        self._writer.start()

    def _scan(self) -> None:
        """Lists the entries in the folder and their bytes, in order of use; removes forgotten temporary files."""
        entries = []
        for file in os.scandir(self.folder):
            with contextlib.suppress(OSError):
                stat = file.stat()
                if file.name.endswith(tuple("." + kind for kind in self.sizes)):
                    entries.append((stat.st_mtime_ns, file.name, stat.st_size))
                elif file.name.startswith(MAKING) and time.time() - stat.st_mtime > FORGOTTEN_SECONDS:
                    os.unlink(file.path)
        self._files: OrderedDict[str, int] = OrderedDict((name, size) for _, name, size in sorted(entries))
        self._total = sum(self._files.values())

    # ------------------------------------------------------------ entries

    def entry(self, kind: str, name: bytes) -> tuple[str, bytes] | None:
        """The file of an entry and the name in its header; None as long as the content hash is not known."""
        try:
            content = self._content.known
        except (OSError, ValueError):  # hashing failed, which loading the model reports: nothing can be kept
            return None
        if content is None:
            return None
        on_disk = hashlib.sha256(content.encode() + name).digest()
        return f"{on_disk.hex()}.{kind}", on_disk

    def has(self, kind: str, name: bytes) -> bool:
        """Whether there is an entry; `load` may still find it damaged."""
        entry = self.entry(kind, name)
        return (kind, name) in self._pending or (entry is not None and entry[0] in self._files)

    def save(self, kind: str, name: bytes, fill: Callable[[np.ndarray], object]) -> None:
        """Keeps an entry, unless there is one of this name; fill(uint8 array) writes its bytes."""
        size = self.sizes[kind]
        with self._lock:
            if self.has(kind, name):
                return
            waiting = sum(a.nbytes for a in self._pending.values())
            if size + HEADER.size > self.max_bytes or waiting + size > self.max_pending:
                self.counts.skipped += 1
                return
            data = self._pending[kind, name] = np.empty(size, np.uint8)
            fill(data)
        self._queue.put((kind, name))

    def load(self, kind: str, name: bytes) -> np.ndarray | None:
        """The bytes of an entry, uint8 [size]; None if it is gone or damaged."""
        entry = self.entry(kind, name)
        with self._lock:
            if (kind, name) in self._pending:
                return self._pending[kind, name]
            if entry is None or entry[0] not in self._files:
                return None
            file, on_disk = entry
            try:
                data = self._read(kind, on_disk, self.folder / file)
            except FileNotFoundError:  # another process removed it to make room
                self._drop(file)
                return None
            except (OSError, ValueError):
                self._drop(file)
                self.counts.damaged += 1
                return None
            self._files.move_to_end(file)
            self.counts.loaded += 1
        with contextlib.suppress(OSError):
            os.utime(self.folder / file)
        return data

    def forget(self, kind: str, name: bytes) -> None:
        """Removes an entry, if there is one, after all entries that were saved before are written."""
        self._queue.put(functools.partial(self._forget, kind, name))

    def _forget(self, kind: str, name: bytes) -> None:
        entry = self.entry(kind, name)  # None only if no entry was ever written or found
        with self._lock:
            if entry is not None:
                self._drop(entry[0])

    def _read(self, kind: str, name: bytes, path: Path) -> np.ndarray:
        size = self.sizes[kind]
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != HEADER.size + size:
                raise ValueError("length")
            header, data = file.read(HEADER.size), np.fromfile(file, np.uint8, size)
        if header != _header(kind, name, data):
            raise ValueError("header or checksum")
        return data

    def _drop(self, file: str) -> None:
        self._total -= self._files.pop(file, 0)
        with contextlib.suppress(OSError):
            os.unlink(self.folder / file)

    # ------------------------------------------------------------ the writer's thread

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if callable(item):
                item()
            else:
                self._write(*item)

    def _write(self, kind: str, name: bytes) -> None:
        data, entry = self._pending[kind, name], self._entry_when_known(kind, name)
        file = None
        with contextlib.suppress(OSError):
            if entry is not None:
                self.write_file(entry[0], _header(kind, entry[1], data), data)
                file = entry[0]
        with self._lock:
            del self._pending[kind, name]
            if file is not None:
                size = HEADER.size + data.nbytes
                self._total += size - self._files.get(file, 0)  # another process may have written it, too
                self._files[file] = size
                self.counts.written += 1
                if self.counts.written % RESCAN == 0:
                    with contextlib.suppress(OSError):  # the folder was removed: writes will say so
                        self._scan()
                self._make_room()
            else:
                self.counts.skipped += 1

    def _entry_when_known(self, kind: str, name: bytes) -> tuple[str, bytes] | None:
        """`entry`, once the content hash is known; None if it is not known GRACE_SECONDS after `close`."""
        with contextlib.suppress(OSError, ValueError):
            while self._content.known is None and not self._closing.wait(WAIT_SECONDS):
                pass
            self._content.wait(timeout=GRACE_SECONDS)
        return self.entry(kind, name)

    def write_file(self, file: str, header: bytes, data: np.ndarray) -> None:
        """Writes an entry's file, whole or not at all. OSError if it cannot be written."""
        handle, beside = tempfile.mkstemp(prefix=MAKING, dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(header)
                out.write(data.data)
            os.replace(beside, self.folder / file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise

    def _make_room(self) -> None:
        while self._total > self.max_bytes:
            self._drop(next(iter(self._files)))
            self.counts.evicted += 1

    def flush(self) -> None:
        """Waits until all entries that were saved so far are on disk."""
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()

    def close(self) -> None:
        """Writes the entries that wait (none, if the content hash is not known in time) and ends the thread."""
        self._closing.set()
        self._queue.put(None)
        self._writer.join()


def _header(kind: str, name: bytes, data: np.ndarray) -> bytes:
    known = MAGIC, kind.encode(), name, data.nbytes
    checksum = hashlib.sha256(repr(known).encode())
    checksum.update(data.data)
    return HEADER.pack(*known, checksum.digest()[:16])
