"""A model's text does not act on a terminal; a pipe gets it unchanged."""

import contextlib
import io
import os
import pty
import select

from lockstep.cli import main
from lockstep.commands.terminal.conversation import tell
from lockstep.commands.terminal.output import shown, write

HOSTILE = "a\x1b]52;c;eA==\x07\x1b[2J\x9b31m\r\b\x00\x7fb\n\tc \N{PILE OF POO}\N{SNOWMAN}"
SHOWN = "a\\x1b]52;c;eA==\\x07\\x1b[2J\\x9b31m\\x0d\\x08\\x00\\x7fb\n\tc \N{PILE OF POO}\N{SNOWMAN}"


@contextlib.contextmanager
def terminal():
    """A context in which standard output and error are a terminal; yields a function that returns their text up to its
    end, for which it waits: a terminal hands over what was written in parts."""
    ours, theirs = pty.openpty()
    stream = io.TextIOWrapper(os.fdopen(theirs, "wb", 0), "utf-8", write_through=True)

    def read(end):
        written = b""
        while not written.endswith(end.encode()):
            assert select.select([ours], [], [], 10)[0], written
            written += os.read(ours, 1 << 16)
        return written.decode().replace("\r\n", "\n")

    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield read
    os.close(ours)
    stream.close()


def test_on_a_terminal_control_characters_are_written_out():
    with terminal() as read:
        write(HOSTILE)
        assert read("\N{SNOWMAN}") == SHOWN
        tell(f"stopped at {HOSTILE}")
        assert read(")\r\n") == f"(stopped at {SHOWN})\n"
        assert main(["generate", "\x1b[2J", "-p", "x"]) != 0
        said = read("\n")
    assert "\x1b" not in said and "\\x1b[2J" in said


def test_elsewhere_the_bytes_are_the_model_s(capsys):
    write(HOSTILE)
    assert capsys.readouterr().out == HOSTILE and shown(HOSTILE, io.StringIO()) == HOSTILE
