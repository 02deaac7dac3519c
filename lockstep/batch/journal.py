"""The journal of a batch: a file beside its output that has every answer so far, in the order in which they came.

A process that is killed leaves the journal behind, perhaps with half a line at its end. The next one takes the answers
of all whole lines, cuts the rest off, and goes on. Each line has a checksum, a mark and its content; the lock (flock)
on the journal is what keeps a second process away.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.batch.lines import key_of
from lockstep.new_files import USUAL_FILE, take_lock

ABOUT, ANSWERED, FAILED = b"about", b"answered", b"failed"  # marks of lines
VERSION = "lockstep batch 1"
BEGUN = re.compile(rb"[0-9a-f]{1,8}(?:$| (?:$|a))")  # the beginning of a journal's first line


def journal_path(output: Path) -> Path:
    """The journal of an output."""
    return output.with_name(f"{output.name}.partial")


class Journal:
    """The open and locked journal of one output. ValueError where another process has it, or where the file is no
    journal; OSError where it cannot be written.

    about: facts about the run that began it, such as its context. failed: keys of lines whose answer is an error; those
    of an earlier process are not in the journal, so that they are asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.about, self.failed = path, dict[str, Any](), set[bytes]()
        self._offsets: dict[bytes, int] = {}
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, USUAL_FILE)
        self._file = os.fdopen(handle, "r+b", buffering=0)
        try:
            self._lock()
            self._end = self._read()
            self._file.truncate(self._end)  # of half a line
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        handle = self._file.fileno()
        is_mine = take_lock(handle) is not False
        # a process that has just ended may have removed the file between its opening and its lock
        if not is_mine or not self.path.exists() or not os.path.samestat(os.fstat(handle), self.path.stat()):
            raise ValueError(f"{self.path}: another lockstep batch is writing this output, wait for its end")

    def _read(self) -> int:
        """Takes in all whole lines; returns the place of the end of the last one."""
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                if end == 0 and not _begins_journal(line):
                    raise ValueError(f"{self.path}: this is not what lockstep batch keeps; give OUT another name")
                if line.endswith(b"\n"):
                    self._take(end, line)
                    end += len(line)
        return end

    def _take(self, offset: int, line: bytes) -> None:
        mark, content = _entry(line)
        if mark == ABOUT:
            self.about |= json.loads(content)
        elif mark == ANSWERED and (key := key_of(content)) is not None:
            self._offsets[key] = offset

    # ------------------------------------------------------------ answers

    def __contains__(self, key: bytes) -> bool:
        return key in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def tell(self, **facts: object) -> None:
        """Notes facts about the run, unless they are noted already."""
        if self._end == 0 or any(self.about.get(name) != value for name, value in facts.items()):
            self.about |= facts
            self._append(ABOUT, json.dumps({"version": VERSION, **facts}).encode("ascii"))

    def keep(self, key: bytes, output_line: bytes, is_answered: bool) -> None:
        """Keeps the output's line with the answer to a line. OSError, after which the journal is as it was before."""
        self._offsets[key] = self._append(ANSWERED if is_answered else FAILED, output_line)
        if not is_answered:
            self.failed.add(key)

    def _append(self, mark: bytes, content: bytes) -> int:
        offset, entry = self._end, memoryview(b"%08x %b %b\n" % (zlib.crc32(content), mark, content))
        try:
            self._file.seek(offset)
            while entry:
                entry = entry[self._file.write(entry) or 0 :]
        except BaseException as error:
            self._file.truncate(offset)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            raise
        self._end = self._file.tell()
        return offset

    def line(self, key: bytes) -> bytes:
        """The output's line that was kept for a key. KeyError if there is none."""
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(self._offsets[key])
            return _entry(file.readline())[1]

    def output_lines(self) -> Iterator[bytes]:
        """Yields the output's lines of all answers that an earlier process has kept."""
        for key in self._offsets:
            yield self.line(key)

    # ------------------------------------------------------------ its end

    def close(self) -> None:
        """Gives the journal back; one that has no answer yet is removed."""
        if not self._offsets:
            self.remove()
        self._file.close()

    def remove(self) -> None:
        """Removes the journal: its answers are in the output."""
        self._offsets.clear()
        self.path.unlink(missing_ok=True)


def _begins_journal(line: bytes) -> bool:
    """Whether the first line of a file begins a journal; half of one is no line yet, and does."""
    mark, content = _entry(line)
    if not line.endswith(b"\n"):
        return BEGUN.match(line) is not None
    return mark == ABOUT and json.loads(content).get("version") == VERSION


def _entry(line: bytes) -> tuple[bytes, bytes]:
    """The mark and content of a line; (b"", b"") for one that is damaged."""
    checksum, _, rest = line.removesuffix(b"\n").partition(b" ")
    mark, _, content = rest.partition(b" ")
    return (mark, content) if checksum == b"%08x" % zlib.crc32(content) else (b"", b"")
