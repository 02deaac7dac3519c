"""Reading single keys of a quantization_config."""

from collections.abc import Mapping
from typing import Any


def whole(config: Mapping[str, Any], key: str, *allowed: int) -> int:
    """An integer of the config, one of those allowed (if any are given); else any from -1 to 2^20."""
    value = config.get(key)
    if type(value) is not int or not -1 <= value <= 1 << 20 or (allowed and value not in allowed):
        expected = " or ".join(map(str, allowed)) or "an integer"
        raise ValueError(f"quantization_config key {key!r}: expected {expected}, got {value!r}")
    return value


def only(config: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """ValueError unless the key has one of these values, or is absent."""
    value = config.get(key)
    if value is not None and not any(value is one or (type(value) is type(one) and value == one) for one in allowed):
        raise ValueError(
            f"quantization_config key {key!r}: {value!r} is not supported, only {' or '.join(map(repr, allowed))}; it "
            f"changes the result"
        )
