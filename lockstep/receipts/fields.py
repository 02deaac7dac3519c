"""Reads the fields of a JSON object that came from anybody: each has one type and bounds, and none is unknown."""

import base64
import binascii
import hashlib
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Never

from lockstep.receipts.errors import ReceiptError

HEX = re.compile(r"[0-9a-f]*")


class Fields:
    """The fields of one object. where: its place in the whole, for error messages, such as "answer.".

        with reading(value, "answer.") as fields:
            root = fields.hex("root", 32)

    A field that is missing, has another type or breaks a bound is a ReceiptError; so is, at the end of the block, one
    that was not asked for.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            raise ReceiptError(f"{where.rstrip('.') or 'receipt'}: expected an object, got {shown(value)}")
        self._left, self.where = dict(value), where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def finish(self) -> None:
        """ReceiptError for fields that are left over."""
        if self._left:
            self.refuse(next(iter(self._left)), "expected no such field")

    def refuse(self, name: str, problem: str) -> Never:
        """Raises a ReceiptError about a field."""
        raise ReceiptError(f"{self.where}{name}: {problem}")

    def take(self, name: str) -> Any:
        """The value of a field of any type."""
        if name not in self._left:
            self.refuse(name, "expected, but missing")
        return self._left.pop(name)

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from low to high."""
        value = self.take(name)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"expected an integer from {low} to {high}, got {shown(value)}")
        return value

    def text(self, name: str, max_chars: int) -> str:
        """A text of at most max_chars characters."""
        value = self.take(name)
        if not isinstance(value, str) or len(value) > max_chars:
            self.refuse(name, f"expected a text of at most {max_chars} characters, got {shown(value)}")
        return value

    def boolean(self, name: str) -> bool:
        """True or False."""
        value = self.take(name)
        if not isinstance(value, bool):
            self.refuse(name, f"expected true or false, got {shown(value)}")
        return value

    def hex(self, name: str, num_bytes: int) -> bytes:
        """Bytes, written as two lower-case hexadecimal digits each."""
        value = self.take(name)
        if not isinstance(value, str) or len(value) != 2 * num_bytes or not HEX.fullmatch(value):
            self.refuse(name, f"expected {2 * num_bytes} hexadecimal digits, got {shown(value)}")
        return bytes.fromhex(value)

    def base64(self, name: str, num_bytes: int) -> bytes:
        """So many bytes in standard base64. Its length is checked before it is decoded."""
        value, length = self.take(name), 4 * -(-num_bytes // 3)
        if not isinstance(value, str) or len(value) != length:
            self.refuse(name, f"expected base64 of {num_bytes} bytes, {length} characters, got {shown(value)}")
        found = from_base64(value)
        if found is None or len(found) != num_bytes:
            self.refuse(name, f"expected base64 of {num_bytes} bytes, got {shown(value)}")
        return found

    def items(self, name: str, most: int, check: Callable[[Any], bool], what: str) -> list[Any]:
        """A list of at most `most` items, each of which passes a check; what: what they are."""
        value = self.take(name)
        if not isinstance(value, list) or len(value) > most or not all(map(check, value)):
            self.refuse(name, f"expected a list of at most {most} {what}, got {shown(value)}")
        return value


@contextmanager
def reading(value: Any, where: str = "") -> Iterator[Fields]:
    """The Fields of a value, of which none may be left at the end of the block."""
    fields = Fields(value, where)
    yield fields
    fields.finish()


def from_base64(text: str) -> bytes | None:
    """The bytes of standard base64 as `to_base64` writes it; None for any other text."""
    try:
        found = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        return None
    return found if to_base64(found) == text else None


def to_base64(data: bytes) -> str:
    """Bytes in standard base64, with padding."""
    return base64.b64encode(data).decode("ascii")


def ids_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32, of which digests are made."""
    return array("I", token_ids).tobytes()


def ids_digest(token_ids: Sequence[int]) -> bytes:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids_bytes(token_ids)).digest()


def is_token(value: Any) -> bool:
    """Whether a value is a token id."""
    return type(value) is int and 0 <= value < 1 << 31


def shown(value: Any) -> str:
    """A value in an error message."""
    return f"{value!r:.80}"


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}
