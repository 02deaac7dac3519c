"""Memory maps of checkpoint files, read-only, and reading JSON files of bounded size.

Only headers are read through a map, because touching a page of a file that was truncated meanwhile ends the process
(SIGBUS). Weights are read with `read_array`, which raises an error instead. What remains is a file that is truncated
while its header is parsed, or before a metadata array (a tokenizer's) is first read.
"""

import contextlib
import json
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_JSON_BYTES = 100 << 20
MAX_JSON_FIELDS = 5 << 17  # a safetensors header has 4 for each of its tensors
MAX_JSON_VALUES = 12 << 17
LFS = b"version https://git-lfs"


class MappedFile(mmap.mmap):
    """A read-only map that keeps its file open: `path`, `descriptor` (closed with the map)."""

    path: Path
    descriptor: int


def map_file(path: Path) -> np.ndarray:
    """The whole file as read-only uint8 [size], mapped, not read. Raises ValueError if it is empty, missing or a
    pointer of Git LFS."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise ValueError(f"{path}: the file is empty")
        mapped = MappedFile(descriptor, size, access=mmap.ACCESS_READ)
    except BaseException:
        os.close(descriptor)
        raise
    mapped.path, mapped.descriptor = path, descriptor
    weakref.finalize(mapped, os.close, descriptor)
    refuse_pointer(path, mapped[: len(LFS)])
    return np.frombuffer(mapped, np.uint8)


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """ValueError if a file, as its first bytes show, is what Git LFS leaves in place of files until it fetches them."""
    if beginning.startswith(LFS):
        raise ValueError(f"{path}: a pointer of Git LFS in place of the file, which `git lfs pull` downloads")


def cut_off(where: str, what: str) -> ValueError:
    """The error for a file that ends before `what` does."""
    return ValueError(f"{where}: {what}: the file is cut off, as by a download that was not finished")


def read_array(array: np.ndarray) -> np.ndarray:
    """A copy of a C-contiguous array; one that lies in a mapped file is read from the file, not through the map.

    Raises ValueError naming the file if it has become shorter since it was opened.
    """
    file = _mapped_file(array)
    if file is None:
        return array.copy()
    assert array.flags.c_contiguous, array.strides
    copy = np.empty(array.shape, array.dtype)
    start = array.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data
    left = copy.reshape(-1).view(np.uint8)
    while len(left):
        num_read = os.preadv(file.descriptor, [left.data], start)
        if num_read == 0:
            size = os.fstat(file.descriptor).st_size
            raise ValueError(f"{file.path}: the file had {len(file)} bytes when it was opened and now has {size}")
        left, start = left[num_read:], start + num_read
    return copy


def descriptor_of(array: np.ndarray) -> int:
    """The descriptor of the mapped file that an array is a view of."""
    file = _mapped_file(array)
    assert file is not None, array.shape
    return file.descriptor


class Place(NamedTuple):
    """Where an array lies: an open file, and its first byte there."""

    descriptor: int
    start: int


def place_of(array: np.ndarray) -> Place | None:
    """Where an array lies in a mapped file; None for one in memory, or one whose elements are not side by side."""
    file = _mapped_file(array)
    if file is None or not array.flags.c_contiguous:
        return None
    return Place(file.descriptor, array.ctypes.data - np.frombuffer(file, np.uint8).ctypes.data)


@contextlib.contextmanager
def own_descriptor(descriptor: int) -> Iterator[int]:
    """A file opened once more, with leases of its own, as long as the `with` lasts. OSError if that is impossible."""
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    try:
        yield opened
    finally:
        os.close(opened)


def _mapped_file(array: np.ndarray) -> MappedFile | None:
    """The mapped file that an array views; None for an array in memory."""
    owner = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    return owner if isinstance(owner, MappedFile) else None


def read_json_object(path: Path) -> dict:
    """A JSON file that holds one object. Raises ValueError naming the file if it is missing, too large or not an
    object."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes of JSON, at most {MAX_JSON_BYTES} are allowed")
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    return parse_json_object(raw, str(path))


def parse_json_object(raw: bytes, where: str) -> dict:
    """Parse one JSON object, without duplicate keys. Raises ValueError starting with `where`."""
    _check_density(raw, where)
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _check_density(raw: bytes, where: str) -> None:
    # Parsed, empty lists take a hundred times their size as text. In real headers one byte in 20 opens a list or
    # object.
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > (1 << 16) + len(raw) // 10:
        raise ValueError(f"{where}: {containers} lists and objects in {len(raw)} bytes of JSON")
    for mark, most in ((b":", MAX_JSON_FIELDS), (b",", MAX_JSON_VALUES)):
        if (found := raw.count(mark)) > most:
            raise ValueError(
                f"{where}: {found} times {mark.decode()!r} in {len(raw)} bytes of JSON, at most {most} are allowed"
            )


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate name {duplicate!r}")
    return unique
