"""Output of commands. Text of a model or a file never acts on the terminal: control characters are escaped."""

import os
import sys

import typer

PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended
# control characters can change a terminal's title, colours, clipboard and earlier output
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def shown(text, stream):
    """Text for a stream: a terminal gets control characters escaped, as \\x1b; other streams get the text unchanged."""
    return text.translate(CONTROLS) if stream.isatty() else text


def has_colours(stream) -> bool:
    """Whether text for a stream may be coloured or dimmed: it is a terminal that can, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say_stage(text: str) -> None:
    """Says on standard error which measurement begins. There is no live display during one, not on a terminal
    either: another Python thread would delay what is measured."""
    print(f"lockstep: {text}", file=sys.stderr, flush=True)


def counted(count: int, noun: str) -> str:
    """A number with a noun: "1 token", "12 tokens"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def write(text) -> None:
    """Writes text to standard output at once; ends the command quietly if its reader has gone."""
    try:
        sys.stdout.write(shown(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise typer.Exit(unread()) from None


def unread():
    """The exit code where the reader of standard output has gone. Output that is still buffered is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
