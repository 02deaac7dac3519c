"""Texts that a command line names: files, standard input, or the argument itself."""

import contextlib
import os
import select
import sys
from pathlib import Path

MOST_PIPED = 256 << 20  # bytes of standard input, which may never end


def read_text(name):
    """A UTF-8 file, or standard input for -. ValueError for other bytes, or for a standard input that is closed or does
    not end."""
    if name == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: expected a text there")
    raw = sys.stdin.buffer.read(MOST_PIPED + 1) if name == "-" else Path(name).read_bytes()
    if name == "-" and len(raw) > MOST_PIPED:
        raise ValueError(f"standard input has more than {MOST_PIPED >> 20} MiB: expected a text that ends")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "standard input" if name == "-" else name
        raise ValueError(f"{where}: not UTF-8 text, byte {error.start} is 0x{raw[error.start]:02x}") from None


def read_piped() -> str:
    """All of standard input. Where nothing comes for a second, a line says that it is waited for."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file that can be waited for
        if not select.select([sys.stdin], [], [], 1.0)[0]:
            print("lockstep: reading standard input to its end (none: < /dev/null)", file=sys.stderr, flush=True)
    return read_text("-")


def read_or_itself(value: str, can_be_itself: bool, what: str) -> str:
    """The text of the file that an argument names, or the argument, where it can be the text itself: `what`, in words.
    ValueError for an argument that is neither."""
    if value == "-" or os.path.exists(value):
        return read_text(value)
    if not can_be_itself:
        raise ValueError(f"{value!r:.80}: expected a file, or {what}; there is no such file")
    return value
