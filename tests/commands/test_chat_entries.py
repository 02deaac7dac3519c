"""Entries of `lockstep chat`: lines, quoted texts and /commands, piped or typed in a terminal."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

from lockstep.commands.terminal.entries import PipedEntries, is_open, parsed
from tests.commands.test_cli import Output

NAMES = ("set", "system")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("hello", (None, "hello")),
        ("/set top_k 3 ", ("set", "top_k 3")),
        ("/", ("", "")),
        ("/unknown a", ("unknown", "a")),
        ('"""a\nb"""', (None, "a\nb")),
        ('"""\n  a\nb\n""" ', (None, "  a\nb")),
        ('"""/set"""', (None, "/set")),
        ('/system """\na\nb"""', ("system", "a\nb")),
        ("/* a comment */\nint main;", (None, "/* a comment */\nint main;")),
        ("/system a\nb", ("system", "a\nb")),
        ('say """this"""', (None, 'say """this"""')),
        ('"""\ndef f():\n    """Doc."""\n"""', (None, 'def f():\n    """Doc."""')),
        ('"""Doc.\n\nMore.\n"""\nimport os\n', (None, '"""Doc.\n\nMore.\n"""\nimport os')),
        ('"""Doc."""\ndef f():\n    """Doc."""', (None, '"""Doc."""\ndef f():\n    """Doc."""')),
        ('""""""', (None, "")),
        ("pasted\n", (None, "pasted")),
    ],
)
def test_what_an_entry_says(entry, expected):
    assert parsed(entry, NAMES) == expected and not is_open(entry)


@pytest.mark.parametrize(
    "entry", ['"""', '"""a', '"""a\nb', '/system """a', '"""a""" b', '"""\n"""Doc."""', '"""\n"""Doc\n', '""""']
)
def test_open_quotes(entry):
    assert is_open(entry)


def entries_of(raw, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Output(raw))
    piped = PipedEntries()
    return iter(piped.read, None)


def test_piped_entries(monkeypatch):
    raw = b'one\n\n"""two\r\nlines\n"""\n/set a 1\nlast'
    assert list(entries_of(raw, monkeypatch)) == ["one", "", '"""two\nlines\n"""', "/set a 1", "last"]


def test_quotes_that_never_close(monkeypatch):
    with pytest.raises(ValueError, match='standard input ends before the closing """ of \'"""a\''):
        list(entries_of(b'"""a\nb\n', monkeypatch))


# ------------------------------------------------------------ typed

READS = """
from lockstep.commands.terminal.entries import TypedEntries
typed = TypedEntries(["regenerate", "reset"])
while (entry := typed.read()) is not None:
    print("read", repr(entry), flush=True)
print("ended", flush=True)
"""
PROMPT_IS_THERE = "\x1b[?2004h"  # prompt_toolkit asks the terminal to mark what is pasted


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, code):
        self._ours, theirs = pty.openpty()
        environment = os.environ | dict(TERM="xterm")
        streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)
        os.close(theirs)
        self._seen = ""

    def wait_for(self, text):
        """Reads until the text is there, and drops all up to its end."""
        deadline = time.monotonic() + 60
        while text not in self._seen:
            assert select.select([self._ours], [], [], deadline - time.monotonic())[0], (
                f"{text!r} not in {self._seen!r}"
            )
            self._seen += os.read(self._ours, 1 << 16).decode()
        self._seen = self._seen.partition(text)[2]

    def type(self, keys, shows):
        """Sends keys once a prompt is there, and waits for what they show."""
        self.wait_for(PROMPT_IS_THERE)
        os.write(self._ours, keys.encode())
        self.wait_for(shows)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    made = Terminal(READS)
    yield made
    made.close()


def test_typed_entries(terminal):
    for keys, entry in (
        ("hello\r", "hello"),
        ("\x1b[200~def f(x):\r\treturn x\r\x1b[201~\r", "def f(x):\n\treturn x\n"),  # pasted: Enter comes after it
        ('"""two\rlines"""\r', '"""two\nlines"""'),
        ("a\x1b\rb\r", "a\nb"),
        ("\x1b[A\x7fc\r", "a\nc"),  # the entry before, with its last character replaced
        ("caf\u00e9\r", "caf\u00e9"),
        ("/reg\t\r", "/regenerate"),
        ("\r", ""),
    ):
        terminal.type(keys, f"read {entry!r}")
    for keys in ("dropped\x03", '"""dropped\rtoo\x03', "\x03"):
        terminal.type(keys, "(Ctrl-D or /exit ends)")
    terminal.type("\x04", "ended")
    assert terminal.process.wait(60) == 0
