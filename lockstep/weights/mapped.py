"""Read-only memory maps of checkpoint files, and small JSON files beside them, both bounded."""

import json
import mmap
from pathlib import Path

import numpy as np

MAX_JSON_BYTES = 100 << 20


def map_file(path: Path) -> np.ndarray:
    """The whole file as read-only uint8 [size], mapped, not read. Raises ValueError if it is empty or missing."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            raise ValueError(f"{path}: the file is empty")
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)


def read_json_object(path: Path) -> dict:
    """A JSON file that holds one object. Raises ValueError naming the file if it is missing, huge or not that."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes of JSON, at most {MAX_JSON_BYTES} are allowed")
    return parse_json_object(path.read_bytes(), str(path))


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
    # Megabytes of empty lists would take a hundred times their size once parsed; real headers have 1 in 20.
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > (1 << 16) + len(raw) // 10:
        raise ValueError(f"{where}: {containers} lists and objects in {len(raw)} bytes of JSON")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate name {duplicate!r}")
    return unique
