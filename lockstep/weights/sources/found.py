"""A model that was found on this disk."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OnError = Callable[[OSError], None]  # gets the error where a folder cannot be read, which then counts as empty


class NotFound(ValueError):
    """There is no model of this name in a source."""


@dataclass(frozen=True)
class FoundModel:
    """A model on this disk. name: what to type for it. path: its folder or file. num_bytes: of its weight files.
    problem: why it cannot be opened; None if nothing is known to be wrong."""

    name: str
    path: Path
    num_bytes: int = 0
    problem: str | None = None


def entries(folder: Path, on_error: OnError) -> list[Path]:
    """What lies in a folder, hidden entries left out, in the order of the names; empty where there is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        on_error(error)
        return []


def files_below(folder: Path, max_depth: int = 3) -> list[str]:
    """The files in a folder and its subfolders, up to `max_depth` levels, as paths inside of it with /."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        if len(inside.parts) >= max_depth - 1:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [(inside / name).as_posix() for name in sorted(files)]
    return found


def file_bytes(*paths: Path) -> int:
    """Bytes of files, links followed; those that cannot be read count nothing."""
    num_bytes = 0
    for path in paths:
        with contextlib.suppress(OSError):
            num_bytes += path.stat().st_size
    return num_bytes
