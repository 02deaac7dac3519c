"""The output of an earlier run: its answers are taken over where their lines are still in the input."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lockstep.batch.lines import key_of


class Finished:
    """The answers in the output of an earlier run, which may not be there. ValueError for a file that is no output."""

    def __init__(self, path: Path) -> None:
        self.path, self._offsets = path, dict[bytes, int]()
        self._file = None
        if path.exists():
            self._file = open(path, "rb")
            self._read()

    def _read(self) -> None:
        assert self._file is not None, "it is there"
        offset = 0
        for number, line in enumerate(self._file, 1):
            key = key_of(line)
            if key is None:
                raise ValueError(
                    f"{self.path}: this file is there, and its line {number} is none that lockstep batch writes; "
                    "remove it, or give OUT another name"
                )
            if is_success(line):
                self._offsets[key] = offset
            offset += len(line)

    def __contains__(self, key: bytes) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, key: bytes) -> bytes:
        """The line of an answer, without its end. KeyError if there is none."""
        offset = self._offsets[key]
        assert self._file is not None, "it has lines"
        self._file.seek(offset)
        return self._file.readline().removesuffix(b"\n")

    def output_lines(self) -> Iterator[bytes]:
        """Yields the lines of all answers."""
        for key in self._offsets:
            yield self.line(key)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def is_success(output_line: bytes) -> bool:
    """Whether a line of the output is an answer, and no error."""
    try:
        response = json.loads(output_line)["response"]
        return response is not None and response["status_code"] == 200
    except (ValueError, TypeError, KeyError):
        return False


def custom_id_digest(line: bytes) -> bytes | None:
    """Stands for the custom_id of a line of an input or output, in few bytes; None for a line that has none."""
    try:
        custom_id = json.loads(line)["custom_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(custom_id, str):
        return None
    return hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).digest()[:8]
