"""What a checkpoint is called: the SHA-256 of what is in its files.

Names, times and headers do not tell two fine-tunes of one model apart, and they differ between two copies of one file.
A file's digest is found by reading all of it once; it is remembered in the user's cache folder for as long as the
file's path, size, times, device and inode stay the same.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from pathlib import Path

from lockstep.user_cache import cache_subfolder

PIECE = 4 << 20  # bytes that are read at once
# A file that is written to again within the file system's tick keeps its times; what is younger is not remembered.
SETTLED_NS = 2_000_000_000
MAX_REMEMBERED = 4096
WAIT_SECONDS = 0.1  # between two reports of progress
DIGEST = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Stamp:
    """What changes when a file does: its real path, size in bytes, times in nanoseconds, device and inode."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int

    @property
    def name(self) -> str:
        """Under which a digest is remembered."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:40]


def stamp(path: Path, descriptor: int | None = None) -> Stamp:
    """The stamp of the file that has a path now, or of the open file that had it."""
    found = path.stat() if descriptor is None else os.fstat(descriptor)
    return Stamp(
        os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino
    )


def content_hash(digests: Sequence[str], tensors: Sequence[Collection[str]], config: Mapping[str, object]) -> str:
    """A checkpoint's name: of its weight files' digests and the names of the tensors taken from each, and its config.

    Names and order of the files do not matter. An index may take a tensor from one of several files that have it.
    """
    files = sorted((digest, sorted(names)) for digest, names in zip(digests, tensors, strict=True))
    return hashlib.sha256(json.dumps([files, config], sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------ digests of files


def blob_digest(path: Path) -> str | None:
    """The digest that a file of the Hugging Face hub's cache has as its name.

    Large files lie there as blobs named by their SHA-256. Small ones have a git hash of 40 digits, which is of no use.
    Only the hub's own folder is trusted: anybody can make a folder of that shape.
    """
    real = Path(os.path.realpath(path))
    is_blob = real.parent.name == "blobs" and hub_cache() in real.parents
    return real.name if is_blob and DIGEST.fullmatch(real.name) else None


def hub_cache() -> Path:
    """The folder in which the Hugging Face hub keeps its files, as its environment variables say."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    base = os.environ.get("HF_HOME")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.realpath(os.path.expanduser(named or os.path.join(base, "hub"))))


def read_digest(path: Path, stamped: Stamp, progress: Callable[[int], None]) -> str:
    """The SHA-256 of all of a file; progress is told the bytes of each piece.

    Raises ValueError if the file is not as it was stamped when its last byte has been read.
    """
    digest, piece = hashlib.sha256(), bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
            progress(count)
    check_unchanged(path, stamped)
    return digest.hexdigest()


def check_unchanged(path: Path, stamped: Stamp) -> None:
    """ValueError if a file is not as it was stamped."""
    found = stamp(path)
    if found != stamped:
        raise ValueError(
            f"{path}: the file changed while the model was being loaded (it had {stamped.size} bytes and "
            f"now has {found.size}); load the model again when nobody writes to it"
        )


def _remembered(stamped: Stamp) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        kept = cache_subfolder("hashes") / stamped.name
        digest = kept.read_text("ascii")
        os.utime(kept)  # it is used: `lockstep cache prune --older-than` leaves it
        return digest if DIGEST.fullmatch(digest) else None
    return None


def remember(stamped: Stamp, digest: str) -> None:
    """Keeps a digest for later runs, if the file has been left alone for a while."""
    if time.time_ns() - stamped.ctime_ns < SETTLED_NS:
        return
    with contextlib.suppress(OSError):
        folder = cache_subfolder("hashes")
        handle, beside = tempfile.mkstemp(dir=folder, prefix=".")
        with os.fdopen(handle, "w") as file:
            file.write(digest)
        os.replace(beside, folder / stamped.name)
        _forget_oldest(folder)


def _forget_oldest(folder: Path) -> None:
    found = list(os.scandir(folder))
    if len(found) > MAX_REMEMBERED:
        for entry in sorted(found, key=lambda e: e.stat().st_mtime_ns)[: MAX_REMEMBERED // 2]:
            os.unlink(entry.path)


# ------------------------------------------------------------ a checkpoint's


class ContentHash:
    """The content hash of a checkpoint, known at once or found in a thread of its own.

    paths, stamps: the weight files, as they were when they were opened; tensors: the names of those taken from each.
    verify: read all of them, known or not. What goes wrong is raised by `known` and `wait`: ValueError for a file that
    changed meanwhile, or that is not what its name in the hub's cache says; OSError where one cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        stamps: Sequence[Stamp],
        tensors: Sequence[Collection[str]],
        config: Mapping[str, object],
        verify: bool = False,
    ):
        self._paths, self._stamps, self._tensors, self._config = paths, stamps, tensors, config
        self._found: Future[str] = Future()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[str], None]] = []
        pairs = zip(paths, stamps, strict=True)
        # The SHA-256 (64 hex digits) of each file, None where it must be read for it.
        self._digests = [None if verify else blob_digest(path) or _remembered(stamped) for path, stamped in pairs]
        sizes = [one.size for one, digest in zip(stamps, self._digests, strict=True) if digest is None]
        self._total, self._done = sum(sizes), 0
        if sizes:
            threading.Thread(target=self._read, name="lockstep content hash", daemon=True).start()
        else:
            self._read()

    @property
    def known(self) -> str | None:
        """64 hex digits; None as long as not all has been read."""
        return self._found.result() if self._found.done() else None

    def wait(self, progress: Progress | None = None, timeout: float | None = None) -> str:
        """64 hex digits. progress: called with ("reading", bytes done, bytes in all) until they are known.

        Raises TimeoutError where they are not known after `timeout` seconds.
        """
        while progress and not self._found.done():
            progress("reading", self._done, self._total)
            concurrent.futures.wait([self._found], WAIT_SECONDS)
        return self._found.result(timeout)

    def when_known(self, callback: Callable[[str], None]) -> None:
        """Calls back with the 64 hex digits, now or in the reading thread; never, if they cannot be found."""
        with self._lock:
            if not self._found.done():
                self._callbacks.append(callback)
            elif self._found.exception() is None:
                callback(self._found.result())

    def _read(self) -> None:
        try:
            digest = content_hash([*map(self._digest, range(len(self._paths)))], self._tensors, self._config)
            with self._lock:  # whoever waits finds what callbacks do done
                for callback in self._callbacks:
                    callback(digest)
                self._found.set_result(digest)
        except BaseException as error:
            self._found.set_exception(error)

    def _digest(self, index: int) -> str:
        path, stamped, known = self._paths[index], self._stamps[index], self._digests[index]
        if known is not None:
            return known
        found, named = read_digest(path, stamped, self._advance), blob_digest(path)
        if named not in (None, found):
            raise ValueError(f"{path}: damaged: the hub names it {named}, its content is {found}; download it again")
        remember(stamped, found)
        return found

    def _advance(self, count: int) -> None:
        self._done += count
