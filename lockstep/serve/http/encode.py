"""Values as JSON bytes."""
import json

from starlette.responses import Response

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def to_text(value):
    """A value as compact JSON; a string as it stands inside a larger one. ValueError for NaN and infinity."""
    return _encoder.encode(value)


def to_json(value):
    """The same as bytes."""
    return _encoder.encode(value).encode("ascii")


def json_response(value, status=200):
    """A value, or its JSON as bytes, as a response."""
    return Response(value if isinstance(value, bytes) else to_json(value), status, media_type="application/json")
