"""Reads messages of Protocol Buffers, strictly: the fields that are asked for, and nothing that lies outside of them.

Source: the encoding page of protobuf.dev.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which newer files do not have
KINDS = {"int": VARINT, "bool": VARINT, "float": FIXED32, "bytes": BYTES, "text": BYTES}
MAX_VARINT_BYTES = 10


class Message:
    """A message: its bytes from `start` to `stop`, and what to call it in an error message."""

    def __init__(self, raw: bytes, name: str, start: int = 0, stop: int | None = None) -> None:
        self.raw, self.name, self.start, self.stop = raw, name, start, len(raw) if stop is None else stop

    def fields(self) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, start, stop) of the value of each field, in the order of the message."""
        at = self.start
        while at < self.stop:
            key, at = self._varint(at)
            number, wire = key >> 3, key & 7
            begin, end = self._value(wire, at, number)
            if number == 0 or end > self.stop:
                raise ValueError(f"{self.name}: field {number} ends at byte {end}, the message at byte {self.stop}")
            yield number, wire, begin, end
            at = end

    def values(self, wanted: Mapping[int, tuple[str, str]]) -> dict[str, Any]:
        """{name: value} of the fields that are there. wanted: {field number: (name, kind)}; each may be there once."""
        found: dict[str, Any] = {}
        for number, wire, start, stop in self.fields():
            if number not in wanted:
                continue
            name, kind = wanted[number]
            if wire != KINDS[kind]:
                raise ValueError(f"{self.name}: {name} has wire type {wire}, expected {KINDS[kind]}")
            if name in found:
                raise ValueError(f"{self.name}: {name} is there twice")
            found[name] = self._typed(kind, name, start, stop)
        return found

    def messages(self, wanted: int, name: str) -> Iterator["Message"]:
        """The messages in a repeated field, named by their positions."""
        index = 0
        for number, wire, start, stop in self.fields():
            if number == wanted:
                if wire != BYTES:
                    raise ValueError(f"{self.name}: {name} {index} has wire type {wire}, expected {BYTES}")
                yield Message(self.raw, f"{name} {index}", start, stop)
                index += 1

    def only(self, wanted: int, name: str) -> "Message":
        """The message in a field that is there at most once; an empty one if it is not there."""
        found = list(self.messages(wanted, name))
        if len(found) > 1:
            raise ValueError(f"{self.name}: {name} is there {len(found)} times")
        return Message(self.raw, name, *((found[0].start, found[0].stop) if found else (0, 0)))

    def _value(self, wire: int, at: int, number: int) -> tuple[int, int]:
        if wire == VARINT:
            return at, self._varint(at)[1]
        if wire == BYTES:
            length, begin = self._varint(at)
            return begin, begin + length
        if wire not in (FIXED32, FIXED64):
            raise ValueError(f"{self.name}: field {number} at byte {at} has the unknown wire type {wire}")
        return at, at + (4 if wire == FIXED32 else 8)

    def _varint(self, at: int) -> tuple[int, int]:
        """(value, where it ends) of the integer at a byte: 7 bits in each, lowest first, until one below 128."""
        value = 0
        for index in range(MAX_VARINT_BYTES):
            if at + index >= self.stop:
                raise ValueError(f"{self.name}: an integer at byte {at} goes on behind the end at byte {self.stop}")
            byte = self.raw[at + index]
            value |= (byte & 127) << 7 * index
            if byte < 128:
                return value, at + index + 1
        raise ValueError(f"{self.name}: the integer at byte {at} has more than {MAX_VARINT_BYTES} bytes")

    def _typed(self, kind: str, name: str, start: int, stop: int) -> Any:
        if kind == "float":
            return struct.unpack_from("<f", self.raw, start)[0]
        if kind == "bytes":
            return self.raw[start:stop]
        if kind == "text":
            try:
                return self.raw[start:stop].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.name}: {name} is not UTF-8 text ({error})") from None
        value = self._varint(start)[0] & (1 << 64) - 1
        if kind == "bool":
            return bool(value)
        return value - (1 << 64) if value >> 63 else value  # a negative int32 is stored as 64 bits
