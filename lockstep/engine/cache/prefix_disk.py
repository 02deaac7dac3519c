"""The prefix cache on disk: pages and states as files, which outlive the process and are shared by several processes
while they run.

An entry is a file of a SharedFolder, named by the model's content hash and its block's name: a header (magic, kind,
name, length, checksum) and the bytes. Until the content hash is known, entries wait in memory. An entry that does not
fit its header is removed and counted, never used. The checksum finds damage, not malice: whoever may write to the
folder may change what the model sees.
"""

import contextlib
import functools
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from lockstep.engine.cache.shared_folder import SharedFolder
from lockstep.user_cache import NotPrivate, make_private, obstacle_of, warn_not_kept
from lockstep.weights.content import ContentHash

MAGIC, HEADER = b"lockstep cache 1", struct.Struct("<16s8s32sQ16s")
GRACE_SECONDS = 2  # how long `close` waits for the content hash, if an entry is to be written
WAIT_SECONDS = 0.05  # between two checks whether the content hash is known
LOOK_SECONDS = 0.1  # for how long what was seen in the folder holds: a request that waits for room asks in each step


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
    """Entries of several kinds in a folder of at most `max_bytes`; the least recently used make room.

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
        self._seen: dict[str, bool] = {}  # whether a file was there, in the looks since `_seen_since`
        self._seen_since = 0.0
        self._queue: SimpleQueue = SimpleQueue()
        self._closing = threading.Event()
        try:
            self.folder = make_private(self.folder.absolute())
            with tempfile.TemporaryFile(dir=self.folder):
                self.shared = SharedFolder(self.folder, max_bytes)
        except NotPrivate as error:
            raise ValueError(f"cache_dir: {error}") from None
        except OSError as error:
            raise ValueError(f"cache_dir {str(folder)!r}: cannot be written ({error.strerror or error})") from None
        self._writer = threading.Thread(target=self._write_all, name="lockstep prefix writer", daemon=True)
        self._writer.start()

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
        """Whether there is an entry, whichever process wrote it; `load` may still find it damaged or gone."""
        if (kind, name) in self._pending:
            return True
        entry = self.entry(kind, name)
        return entry is not None and self._is_there(entry[0])

    def _is_there(self, file: str) -> bool:
        """Whether a file was there at most LOOK_SECONDS ago."""
        now = time.monotonic()
        if now - self._seen_since > LOOK_SECONDS:
            self._seen, self._seen_since = {}, now
        if file not in self._seen:
            self._seen[file] = self.shared.has(file)
        return self._seen[file]

    def save(self, kind: str, name: bytes, fill: Callable[[np.ndarray], object]) -> None:
        """Keeps an entry, unless there is one of this name; fill(uint8 array) writes its bytes."""
        size, entry = self.sizes[kind], self.entry(kind, name)
        with self._lock:
            if (kind, name) in self._pending or (entry is not None and self.shared.has(entry[0])):
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
            if entry is None:
                return None
            file, on_disk = entry
            try:
                data = self._read(kind, on_disk, self.folder / file)
            except FileNotFoundError:  # another process removed it to make room
                self._seen[file] = False
                return None
            except (OSError, ValueError):
                self._drop(file)
                self.counts.damaged += 1
                return None
            self.counts.loaded += 1
        self.shared.touch(file)
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
        self._seen[file] = False
        self.shared.remove(file)

    # ------------------------------------------------------------ the writer's thread

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if callable(item):
                item()
            else:
                self._write(*item)

    def _write(self, kind: str, name: bytes) -> None:
        data, entry = self._pending[kind, name], self._entry_when_known(kind, name)
        num_evicted = None
        try:
            if entry is not None:
                num_evicted = self.shared.put(entry[0], [_header(kind, entry[1], data), data.data])
        except OSError as error:
            obstacle = obstacle_of(error, self.folder, "cache_dir")
            text = f"A computed prompt ({data.nbytes / 1e6:,.1f} MB) cannot be kept in {self.folder}: {obstacle}"
            warn_not_kept((self.folder, error.errno), text)
        with self._lock:
            del self._pending[kind, name]
            if entry is not None and num_evicted is not None:
                self._seen[entry[0]] = True
                self.counts.written += 1
                self.counts.evicted += num_evicted
            else:
                self.counts.skipped += 1

    def _entry_when_known(self, kind: str, name: bytes) -> tuple[str, bytes] | None:
        """`entry`, once the content hash is known; None if it is not known GRACE_SECONDS after `close`."""
        with contextlib.suppress(OSError, ValueError):
            while self._content.known is None and not self._closing.wait(WAIT_SECONDS):
                pass
            self._content.wait(timeout=GRACE_SECONDS)
        return self.entry(kind, name)

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
