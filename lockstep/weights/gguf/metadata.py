"""Reading GGUF metadata, typed key-value pairs, within limits.

Numbers become int, float or bool, strings str, arrays of numbers read-only NumPy views of the file, arrays of strings a
StringArray that decodes on demand, arrays of arrays lists.
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

MAX_KEY_BYTES = (1 << 16) - 1
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY_ITEMS = 1 << 24
MAX_NESTED_ARRAYS = 1 << 16
MAX_TEXT_BYTES = 1 << 27
MAX_ARRAY_DEPTH = 4

DTYPE_OF_TYPE = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
LENGTH_BYTES = 8  # of the length before a string
STRING_TYPE = 8
ARRAY_TYPE = 9
# A string takes at least its 8-byte length, an array its item type and length.
LEAST_BYTES = {number: np.dtype(dtype).itemsize for number, dtype in DTYPE_OF_TYPE.items()}
LEAST_BYTES |= {STRING_TYPE: LENGTH_BYTES, ARRAY_TYPE: 4 + LENGTH_BYTES}


@dataclass
class Allowance:
    """How much more metadata may be read, over all files of a model. File sizes are no limit: files may be sparse.

    items: of all arrays. arrays: nested in arrays. text_bytes: of keys and of values that are one string.
    """

    items: int = MAX_ARRAY_ITEMS
    arrays: int = MAX_NESTED_ARRAYS
    text_bytes: int = MAX_TEXT_BYTES

    def spend(self, name: str, amount: int, what: str) -> None:
        """Takes `amount` from the field `name`. Raises ValueError, starting with `what`, if fewer are left."""
        left = getattr(self, name)
        if amount > left:
            allowed = {field.name: field.default for field in fields(self)}[name]
            raise ValueError(
                f"{what} has {amount} {name.replace('_', ' ')}: {allowed} are allowed in all metadata, {left} are left"
            )
        setattr(self, name, left - amount)


class Cursor:
    """A position in mapped bytes that never reads past their end; errors start with `where` (the file)."""

    def __init__(self, raw: np.ndarray, where: str, allowance: Allowance | None = None):
        self.buffer = raw.data
        self.where = where
        self.position = 0
        self.allowance = allowance or Allowance()

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes. Raises ValueError naming `what` if the file ends before."""
        end = self.position + size
        if end > len(self.buffer):
            left = len(self.buffer) - self.position
            raise ValueError(f"{self.where}: {what} takes {size} bytes at byte {self.position}, {left} are left")
        taken = self.buffer[self.position : end]
        self.position = end
        return taken

    def unsigned(self, size: int, what: str) -> int:
        """The next unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def count(self, size: int, what: str, limit: int, item_bytes: int) -> int:
        """The next unsigned integer: how many items follow, of at least `item_bytes` each."""
        number = self.unsigned(size, what)
        left = len(self.buffer) - self.position
        allowed = min(limit, left // item_bytes)
        if number > allowed:
            raise ValueError(f"{self.where}: {what} is {number}, at most {allowed} are possible in {left} bytes")
        return number

    def string(self, what: str, limit: int) -> str:
        """The next length-prefixed UTF-8 string of at most `limit` bytes."""
        raw = self.take(self.count(8, f"length of {what}", limit, 1), what)
        self.allowance.spend("text_bytes", len(raw), f"{self.where}: {what}")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: {what} is not UTF-8 ({error})") from None


class StringArray(Sequence[str]):
    """Length-prefixed strings in mapped bytes, decoded on access; bytes that are not UTF-8 become U+FFFD.

    start: position of the first string's length. ends: where each string ends and the next one's length begins.
    """

    def __init__(self, buffer: memoryview, start: int, ends: array):
        self._buffer, self._start, self._ends = buffer, start, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        number = range(len(self._ends))[index]
        begin = self._ends[number - 1] if number else self._start
        return str(self._buffer[begin + LENGTH_BYTES : self._ends[number]], "utf-8", "replace")

    def __iter__(self) -> Iterator[str]:
        begin = self._start
        for end in self._ends:
            yield str(self._buffer[begin + LENGTH_BYTES : end], "utf-8", "replace")
            begin = end


def read_metadata(cursor: Cursor, num_pairs: int) -> dict[str, object]:
    """Read `num_pairs` key-value pairs. Raises ValueError for a duplicate key or an unreadable value."""
    metadata: dict[str, object] = {}
    for index in range(num_pairs):
        key = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise ValueError(f"{cursor.where}: metadata key {key!r} appears twice")
        metadata[key] = _read_value(cursor, cursor.unsigned(4, f"type of {key!r}"), f"metadata {key!r}")
    return metadata


def _read_value(cursor: Cursor, value_type: int, what: str, depth: int = 0) -> object:
    if value_type == STRING_TYPE:
        return cursor.string(what, MAX_STRING_BYTES)
    if value_type == ARRAY_TYPE:
        return _read_array(cursor, what, depth)
    return _read_numbers(cursor, value_type, 1, what)[0].item()


def _read_array(cursor: Cursor, what: str, depth: int) -> Sequence[object] | np.ndarray:
    if depth == MAX_ARRAY_DEPTH:
        raise ValueError(f"{cursor.where}: {what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
    item_type = cursor.unsigned(4, f"item type of {what}")
    if item_type not in LEAST_BYTES:
        raise ValueError(f"{cursor.where}: {what} has items of unknown type {item_type}")
    length = cursor.count(8, f"length of {what}", MAX_ARRAY_ITEMS, LEAST_BYTES[item_type])
    cursor.allowance.spend("arrays" if item_type == ARRAY_TYPE else "items", length, f"{cursor.where}: {what}")
    if item_type == ARRAY_TYPE:
        return [_read_array(cursor, what, depth + 1) for _ in range(length)]
    if item_type == STRING_TYPE:
        return _read_strings(cursor, length, what)
    return _read_numbers(cursor, item_type, length, what)


def _read_numbers(cursor: Cursor, value_type: int, length: int, what: str) -> np.ndarray:
    if value_type not in DTYPE_OF_TYPE:
        raise ValueError(f"{cursor.where}: {what} has unknown type {value_type}")
    dtype = np.dtype(DTYPE_OF_TYPE[value_type])
    return np.frombuffer(cursor.take(length * dtype.itemsize, what), dtype)


def _read_strings(cursor: Cursor, length: int, what: str) -> StringArray:
    buffer, start, size = cursor.buffer, cursor.position, len(cursor.buffer)
    ends, position = array("Q"), start
    unpack_length = struct.Struct("<Q").unpack_from
    for index in range(length):
        begin = position + LENGTH_BYTES
        position = begin + unpack_length(buffer, position)[0] if begin <= size else size + 1
        if position > size:
            raise ValueError(f"{cursor.where}: string {index} of {length} in {what} ends past the file's {size} bytes")
        ends.append(position)
    cursor.position = position
    return StringArray(buffer, start, ends)
