"""Values as JSON bytes."""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from starlette.responses import Response

PART = 64  # elements of an array that are made at once


class Parts:
    """An array of JSON that is made in parts, which are lists; it can be gone through once."""

    def __init__(self, parts: Iterable[list]) -> None:
        self.parts = parts


def in_parts(count: int, make: Callable[[int, int], list]) -> Parts:
    """An array of `count` elements, of which make(start, end) gives some."""
    return Parts(make(start, min(start + PART, count)) for start in range(0, count, PART))


def _whole(value: object) -> list:
    if isinstance(value, Parts):
        return [each for part in value.parts for each in part]
    raise TypeError(f"{type(value).__name__} is no JSON")


_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_whole)


def to_text(value: Any) -> str:
    """A value as compact JSON; a string as it stands inside a larger one. ValueError for NaN and infinity."""
    return _encoder.encode(value)


def to_json(value: Any) -> bytes:
    """The same as bytes."""
    return _encoder.encode(value).encode("ascii")


def json_pieces(value: object) -> Iterator[bytes]:
    """The same in pieces: each part of the Parts in it is one, made when it is asked for."""
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
    """A value, or its JSON as bytes, as a response."""
    return Response(value if isinstance(value, bytes) else to_json(value), status, media_type="application/json")
