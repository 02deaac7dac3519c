"""The content hash of a checkpoint: a SHA-256 over its files, under which packed weights are kept.

Names, times and headers do not tell two fine-tunes of one model apart, and they differ between two copies of one file.
So each file is read once. Its digest is remembered in the user's cache folder, for as long as the file's path, size,
times, device and inode stay the same.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from pathlib import Path

from lockstep.new_files import new_file
from lockstep.progress import OnProgress
from lockstep.user_cache import cache_subfolder, keeping, user_cache

PIECE = 4 << 20  # bytes that are read at once
# A second write within one tick of the file system's clock keeps a file's times; so younger files are not remembered.
SETTLED_NS = 2_000_000_000
MAX_REMEMBERED = 4096
WAIT_SECONDS = 0.1  # between two reports of progress
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Stamp:
    """A file's real path, size in bytes, times in nanoseconds, device and inode: equal for an unchanged file."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int

    @property
    def name(self) -> str:
        """The name of the file in the cache folder that remembers the digest."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:40]


def stamp(path: Path, descriptor: int | None = None) -> Stamp:
    """The stamp of the file at `path`, or of the open file `descriptor` that was opened there."""
    status = path.stat() if descriptor is None else os.fstat(descriptor)
    return Stamp(
        os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino
    )


def content_hash(digests: Sequence[str], tensors: Sequence[Collection[str]], config: Mapping[str, object]) -> str:
    """The hash of weight files' digests, the names of the tensors taken from each file, and the config.

    Names and order of the files do not matter. The tensors do: several files may have a tensor of one name, and an
    index says which one counts.
    """
    files = sorted((digest, sorted(names)) for digest, names in zip(digests, tensors, strict=True))
    return hashlib.sha256(json.dumps([files, config], sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------ digests of files


def blob_digest(path: Path) -> str | None:
    """The SHA-256 that is the name of a blob in the Hugging Face hub's cache; None for any other file.

    Small files lie there under a git hash of 40 digits, which is of no use. Only the hub's own folder is trusted:
    anybody can make a folder that looks like it.
    """
    real = Path(os.path.realpath(path))
    is_blob = real.parent.name == "blobs" and hub_cache() in real.parents
    return real.name if is_blob and DIGEST.fullmatch(real.name) else None


def hub_cache() -> Path:
    """The cache folder of the Hugging Face hub's client, as its environment variables name it."""
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    base = os.environ.get("HF_HOME")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.realpath(os.path.expanduser(folder or os.path.join(base, "hub"))))


def read_digest(path: Path, stamped: Stamp, progress: Callable[[int], None]) -> str:
    """The SHA-256 of a whole file. progress: called with the number of bytes of each piece.

    Raises ValueError if the file does not have its stamp any more after the last byte was read.
    """
    digest, piece = hashlib.sha256(), bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        while num_read := file.readinto(piece):
            digest.update(memoryview(piece)[:num_read])
            progress(num_read)
    check_unchanged(path, stamped)
    return digest.hexdigest()


def check_unchanged(path: Path, stamped: Stamp) -> None:
    """ValueError if a file does not have its stamp any more."""
    now = stamp(path)
    if now != stamped:
        raise ValueError(
            f"{path}: the file changed while the model was being loaded (it had {stamped.size} bytes and "
            f"now has {now.size}); load the model again when nobody writes to it"
        )


def _remembered(stamped: Stamp) -> str | None:
    digest = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        entry = cache_subfolder("hashes") / stamped.name
        digest = entry.read_text("ascii")
        os.utime(entry)  # marks it as used, for `lockstep cache prune --older-than`; fails where nothing can be written
    return digest if DIGEST.fullmatch(digest) else None


def remember(stamped: Stamp, digest: str) -> None:
    """Keeps a digest for later runs, if the file is older than SETTLED_NS."""
    if time.time_ns() - stamped.ctime_ns < SETTLED_NS:
        return
    with keeping("The hashes of weight files (a few kB)", user_cache() / "hashes"):
        folder = cache_subfolder("hashes")
        with new_file(folder / stamped.name) as file:
            file.write(digest.encode())
        _forget_oldest(folder)


def _forget_oldest(folder: Path) -> None:
    entries = list(os.scandir(folder))
    if len(entries) > MAX_REMEMBERED:
        for entry in sorted(entries, key=lambda e: e.stat().st_mtime_ns)[: MAX_REMEMBERED // 2]:
            os.unlink(entry.path)


# ------------------------------------------------------------ hash of a checkpoint


class ContentHash:
    """The content hash of a checkpoint, known at once or computed in a thread.

    paths, stamps: the weight files, and their stamps when they were opened. tensors: the names of the tensors taken
    from each file. verify: read all files, even if their digests are remembered. `known` and `wait` raise the thread's
    errors: ValueError for a file that changed, or whose content is not the SHA-256 in its name in the hub's cache;
    OSError for a file that cannot be read.
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
        self._hash: Future[str] = Future()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[str], None]] = []
        pairs = zip(paths, stamps, strict=True)
        # The SHA-256 (64 hex digits) of each file; None for a file that must be read.
        self._digests = [None if verify else blob_digest(path) or _remembered(stamped) for path, stamped in pairs]
        sizes = [one.size for one, digest in zip(stamps, self._digests, strict=True) if digest is None]
        self._total, self._done = sum(sizes), 0
        if sizes:
            threading.Thread(target=self._read, name="lockstep content hash", daemon=True).start()
        else:
            self._read()

    @property
    def known(self) -> str | None:
        """The hash, 64 hex digits; None as long as files are being read."""
        return self._hash.result() if self._hash.done() else None

    def wait(self, progress: OnProgress | None = None, timeout: float | None = None) -> str:
        """The hash, 64 hex digits. progress: called with ("reading", bytes done, bytes in all) while files are read.

        Raises TimeoutError after `timeout` seconds.
        """
        while progress and not self._hash.done():
            progress("reading", self._done, self._total)
            concurrent.futures.wait([self._hash], WAIT_SECONDS)
        return self._hash.result(timeout)

    def when_known(self, callback: Callable[[str], None]) -> None:
        """Calls back with the hash, now or in the reading thread; never, if a file cannot be read."""
        with self._lock:
            if not self._hash.done():
                self._callbacks.append(callback)
            elif self._hash.exception() is None:
                callback(self._hash.result())

    def _read(self) -> None:
        try:
            digest = content_hash([*map(self._digest, range(len(self._paths)))], self._tensors, self._config)
            with self._lock:  # callbacks have run before `wait` returns
                for callback in self._callbacks:
                    callback(digest)
                self._hash.set_result(digest)
        except BaseException as error:
            self._hash.set_exception(error)

    def _digest(self, index: int) -> str:
        path, stamped, known = self._paths[index], self._stamps[index], self._digests[index]
        if known is not None:
            return known
        digest, named = read_digest(path, stamped, self._advance), blob_digest(path)
        if named not in (None, digest):
            raise ValueError(f"{path}: damaged: the hub names it {named}, its content is {digest}; download it again")
        remember(stamped, digest)
        return digest

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
