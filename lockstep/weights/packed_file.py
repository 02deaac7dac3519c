"""A packed weight as a file: a page with its description and checksum, then its arrays, each at the start of a page.

Once the checksum was found to be right, the file's modification time is set to a number made from the checksum and the
id of this boot of the machine. A file that was written to or truncated since has another time, and after a crash there
is another boot: such a file is checked again before it is used.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lockstep.new_files import new_file
from lockstep.runtime.executor import aligned
from lockstep.weights.leased_map import LeasedMaps

MAGIC = b"lockstep packed1"
PAGE = 4096
DIGEST_BYTES = hashlib.sha256().digest_size
CHECKED_SINCE_S = 1 << 29  # marks are times from 1987 to 2004, which files written today never have
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Damaged(ValueError):
    """A file whose content is not what was written."""


def write(path: Path, what: str, arrays: Sequence[np.ndarray]) -> None:
    """Writes a packed weight, whole or not at all.

    what: names the weight and everything that its arrays were made from. Raises OSError if the file cannot be written.
    """
    with new_file(path) as file:
        digest = _write(file, what, arrays)
        file.flush()
        _mark_checked(file.fileno(), digest)


def _write(file: BinaryIO, what: str, arrays: Sequence[np.ndarray]) -> bytes:
    digest, described, end = hashlib.sha256(), [], PAGE
    for array in arrays:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        described.append([array.dtype.str, array.shape, end])
        file.seek(end)
        file.write(raw.data)
        digest.update(raw.data)
        end += -(-array.nbytes // PAGE) * PAGE
    file.truncate(end)
    header = json.dumps(dict(what=what, arrays=described, size=end, sha256=digest.hexdigest())).encode()
    head = MAGIC + hashlib.sha256(header).digest() + len(header).to_bytes(8, "little") + header
    assert len(head) <= PAGE, (what, len(head))
    file.seek(0)
    file.write(head)
    return digest.digest()


def num_bytes(arrays: Sequence[np.ndarray]) -> int:
    """The size of the file of a packed weight."""
    return PAGE + sum(-(-array.nbytes // PAGE) * PAGE for array in arrays)


def read(path: Path, what: str, maps: LeasedMaps, verify: bool = False) -> tuple[np.ndarray, ...]:
    """The arrays of a packed weight, read-only: mapped under a lease, or a copy where there is no lease.

    verify: check the checksum even if it was found to be right before. Raises Damaged if the file is another weight's,
    was truncated or was written to; OSError if there is no file.
    """
    with open(path, "rb") as file:
        raw = maps.map(file.fileno())
        if raw is None:
            raw = _contents(file)
        status = os.fstat(file.fileno())  # after reading, so that a write in the meantime shows
    header = _header(raw[:PAGE].tobytes(), path)
    if header["what"] != what or not header["size"] == status.st_size == len(raw):
        raise Damaged(f"{path}: {status.st_size} bytes of {header['what']!r}, expected {header['size']} of {what!r}")
    arrays = tuple(_array(raw, *described, path=path) for described in header["arrays"])
    if verify or status.st_mtime_ns != _checked_time_ns(bytes.fromhex(header["sha256"])):
        check(path, arrays, header["sha256"])
    return arrays


def _contents(file: BufferedReader) -> np.ndarray:
    raw = aligned(os.fstat(file.fileno()).st_size)
    raw = raw[: file.readinto(raw.data)]
    raw.flags.writeable = False
    return raw


def _header(page: bytes, path: Path) -> dict:
    start = len(MAGIC) + DIGEST_BYTES + 8
    digest, length = page[len(MAGIC) : start - 8], int.from_bytes(page[start - 8 : start], "little")
    header = page[start : start + length]
    if not page.startswith(MAGIC) or hashlib.sha256(header).digest() != digest:
        raise Damaged(f"{path}: not a packed weight, or its first page is damaged")
    return json.loads(header)


def _array(raw: np.ndarray, dtype: str, shape: Sequence[int], begin: int, path: Path) -> np.ndarray:
    end = begin + math.prod(shape) * np.dtype(dtype).itemsize
    if end > len(raw):
        raise Damaged(f"{path}: cut after {len(raw)} bytes, an array ends at {end}")
    return raw[begin:end].view(dtype).reshape(shape)


def check(path: Path, arrays: Sequence[np.ndarray], expected: str) -> None:
    """Damaged unless the arrays have the SHA-256 `expected`; marks the file as checked."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.reshape(-1).view(np.uint8).data)
    if digest.hexdigest() != expected:
        raise Damaged(f"{path}: its content is {digest.hexdigest()}, its description says {expected}")
    with contextlib.suppress(OSError):
        _mark_checked(path, digest.digest())


def _mark_checked(path: Path | int, digest: bytes) -> None:
    when = _checked_time_ns(digest)
    os.utime(path, ns=(when, when))


def _checked_time_ns(digest: bytes) -> int:
    """The modification time that marks a file with this checksum as checked during this boot."""
    number = int.from_bytes(hashlib.sha256(digest + _boot()).digest()[:8], "little")
    return (CHECKED_SINCE_S + number % CHECKED_SINCE_S) * 1_000_000_000 + number // CHECKED_SINCE_S % 1_000_000_000


@functools.cache
def _boot() -> bytes:
    """The id of this boot of the machine; empty if the system has none."""
    with contextlib.suppress(OSError):
        return BOOT_ID.read_bytes()
    return b""
