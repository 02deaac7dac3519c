"""Files of a study: files of JSON lines, to which lines are only added, and files written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.new_files import USUAL_FILE, new_file, remove_leftovers

# the files in a study's folder
RECIPE, STUDY, TRIALS, ROUNDS = "recipe.toml", "study.json", "trials.jsonl", "rounds.jsonl"
CONFIRM, WINNER, WINNER_RECIPE = "confirm.jsonl", "winner.json", "winner.toml"
IDS, CALIBRATION, TIMES = "ids.json", "calibration.npz", "times.jsonl"


def going_on(folder: Path) -> str:
    """The command that continues the study of a folder, and makes anew the files that follow from its rounds."""
    recipe = shlex.quote(str(folder / RECIPE)) if (folder / RECIPE).is_file() else "RECIPE"
    return f"`lockstep ptq run {recipe} --out {shlex.quote(str(folder))}`"


def check_folder(folder: Path) -> None:
    """ValueError if the path of a study's folder is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: it is a file, expected the folder of a study")


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON."""
    return json.dumps(record, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def reason_of(error: Exception) -> str:
    """Why a line is not JSON. The line number of a JSONDecodeError, which would be 1, is left out."""
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


class Lines:
    """Records in a file, in order.

    A last line that was cut short (by a crash or a full disk) is removed, and `was_torn` is set. ValueError, with file
    and line, for a line that is not a JSON object. advice: ends that message. reads_only: the file, to which another
    process may be adding lines, is not changed.
    """

    def __init__(self, path: Path, advice: str = "", reads_only: bool = False) -> None:
        self.path, self.was_torn, self._advice = path, False, advice
        content = path.read_bytes() if path.exists() else b""
        *whole, rest = content.split(b"\n")
        self.records: list[dict[str, Any]] = [self._parsed(i, line) for i, line in enumerate(whole, 1)]
        self._size = len(content) - len(rest)
        if rest:
            self.was_torn = True
        if rest and not reads_only:
            with self._naming_the_file():
                os.truncate(path, self._size)

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        more = f"; {self._advice}" if self._advice else ""
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: it is no JSON: {reason_of(error)}{more}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path}, line {number}: it is {found!r:.80}, expected an object{more}")
        return found

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a line. OSError, with the path, if the disk is full; the lines before it stay as they are."""
        line = line_of(record)
        with self._naming_the_file():
            try:
                with open(self.path, "ab", buffering=0) as file:
                    write_all(file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, self._size)
                raise
        self._size += len(line)
        self.records.append(json.loads(line))

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Makes OSErrors name the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def write_all(file: io.RawIOBase, content: bytes) -> None:
    """Writes all of `content`, in as many pieces as the system takes; OSError if there is no room."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


class Replayed:
    """A file of lines that are computed from another file: lines that it already has must equal the computed ones."""

    def __init__(self, path: Path, source: Path) -> None:
        """source: the file from which the lines are computed."""
        self._lines, self._next, self._source = Lines(path), 0, source
        self.was_torn = self._lines.was_torn

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a line, or checks that the file has it. ValueError, with file and line, if the file has another line."""
        there, self._next = self._lines.records, self._next + 1
        if self._next > len(there):
            self._lines.add(record)
        elif line_of(there[self._next - 1]) != line_of(record):
            raise ValueError(
                f"{self._lines.path}, line {self._next}: it is not what {self._source} gives; one of the two was "
                f"changed, or made by another version; only a new folder is safe"
            )


def save(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all. OSError, with the path."""
    with new_file(path, USUAL_FILE) as file:
        file.write(content)


def save_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all. OSError, with the path."""
    save(path, text.encode())


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A context that keeps other runs out of a folder. ValueError if another run is at work in it."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work in this folder") from None
        remove_leftovers(folder)
        yield
