"""JSON of answers, whole or piece by piece."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from starlette.responses import Response

PART = 64  # the number of an array's elements that are made at once


class Parts:
    """A JSON array that is made part by part, each a list of elements. It can be iterated once."""

    def __init__(self, parts: Iterable[list]) -> None:
        self.parts = parts


def in_parts(num_elements: int, make_elements: Callable[[int, int], list]) -> Parts:
    """An array whose elements start .. end are make_elements(start, end)."""
    return Parts(make_elements(start, min(start + PART, num_elements)) for start in range(0, num_elements, PART))


def _whole(value: object) -> list:
    if isinstance(value, Parts):
        return [each for part in value.parts for each in part]
    raise TypeError(f"{type(value).__name__} is not a JSON value")


_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_whole)


def to_text(value: Any) -> str:
    """A value as compact JSON text, in ASCII. ValueError for NaN and infinity."""
    return "null" if value is None else _encoder.encode(value)  # the encoder takes 3 us for it, and chunks have two


def fields_text(fields: dict[str, Any]) -> str:
    """Fields as the text that follows others within an object: ,"name":value for each."""
    return f",{to_text(fields)[1:-1]}" if fields else ""


def to_json(value: Any) -> bytes:
    """A value as compact JSON bytes, in ASCII. ValueError for NaN and infinity."""
    return _encoder.encode(value).encode("ascii")


def json_pieces(value: object) -> Iterator[bytes]:
    """Yields the JSON bytes of a value in pieces: each part of the Parts in it becomes a piece when it is needed."""
    arrays, mark = [], secrets.token_hex(16)

    def hold(array: Parts) -> str:
        arrays.append(array)
        return mark

    text = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=hold).encode(value)
    first, *rest = text.split(f'"{mark}"')
    yield first.encode("ascii")
    for array, after in zip(arrays, rest, strict=True):
        opening = "["
        for part in filter(None, array.parts):
            yield (opening + to_text(part)[1:-1]).encode("ascii")
            opening = ","
        yield (("[" if opening == "[" else "") + "]" + after).encode("ascii")


def json_response(value: Any, status: int = 200) -> Response:
    """The response with a value, or with JSON bytes."""
    return Response(value if isinstance(value, bytes) else to_json(value), status, media_type="application/json")
