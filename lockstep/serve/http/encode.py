"""Values as JSON bytes."""
import json

_encoder = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def to_text(value):
    """A value as compact JSON; a string as it stands inside a larger one. ValueError for NaN and infinity."""
    return _encoder.encode(value)


def to_json(value):
    """The same as bytes."""
    return _encoder.encode(value).encode("ascii")
