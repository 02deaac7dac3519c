"""What is logged: lines of requests, or a summary every 10 seconds, never a word of prompts and answers; and the writer
that no reader of the log can hold up."""

import logging
import sys
import threading
import time
from collections import deque
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMAT, DATE_FORMAT = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"
BATCH_SECONDS = 0.05  # lines of this time are written together
FLUSH_SECONDS = 1.0  # that the end of the process waits for a reader
MAX_WAITING = 10_000  # lines that wait for a reader; more are dropped and counted


def log_level(given: str) -> int:
    """A level of `logging` by its name, in small or large letters. ValueError for another name."""
    if given.lower() not in LEVELS:
        raise ValueError(f"--log-level: expected {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {given[:40]!r}")
    return logging.getLevelNamesMapping()[given.upper()]


def start_logging(level: int, stream: TextIO | None = None) -> None:
    """Has everything from a level on written, of other packages warnings and errors only. stream: see LogWriter."""
    writer = LogWriter(stream)
    writer.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
    root = logging.getLogger()
    root.addHandler(writer)
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("lockstep").setLevel(level)


class LogWriter(logging.Handler):
    """Formats and writes records in a thread of its own: a terminal that is stopped, or a pipe that nobody reads, holds
    up no request. stream: standard error at the time of writing, if it is None."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream
        self._records: deque[logging.LogRecord] = deque()
        self._num_dropped, self._has_records, self._writing = 0, threading.Event(), threading.Lock()
        threading.Thread(target=self._run, name="lockstep log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record, or drops it where too many wait."""
        if len(self._records) >= MAX_WAITING:
            self._num_dropped += 1
            return
        self._records.append(record)
        self._has_records.set()

    def flush(self) -> None:
        """Writes what waits, unless another thread has been writing for FLUSH_SECONDS."""
        if self._writing.acquire(timeout=FLUSH_SECONDS):
            try:
                self._write()
            finally:
                self._writing.release()

    def _run(self) -> None:
        while self._has_records.wait():
            time.sleep(BATCH_SECONDS)
            self._has_records.clear()
            with self._writing:
                self._write()

    def _write(self) -> None:
        lines = [self._formatted(self._records.popleft()) for _ in range(len(self._records))]
        if self._num_dropped:
            lines.append(f"{self._num_dropped} lines of the log were dropped: nobody read them in time")
            self._num_dropped = 0
        stream = sys.stderr if self._stream is None else self._stream
        try:
            stream.write("".join(f"{line}\n" for line in lines))
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, or it is closed
            pass

    def _formatted(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # arguments that do not fit the message, of whoever logged it
            return f"{record.name}: {record.msg!r}, which cannot be formatted: {error!r}"
