"""Writing answers, and words beside them, so that no text of a model's or a file's acts on the terminal."""

import importlib
import os
import sys
from typing import Any

import typer

PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended
# control characters, with which a terminal's title, colours, clipboard and what was shown before can be changed
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def pyplot() -> Any:
    """matplotlib's, which draws to files. Only --plot needs it."""
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def made_table(title: str | None, *columns: str) -> Any:
    """A table of rich's, without lines between its rows; columns that begin with > stand on the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.strip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return table


def shown(text, stream):
    """Text for a stream: on a terminal control characters are written out, such as \\x1b; elsewhere it is as it is."""
    return text.translate(CONTROLS) if stream.isatty() else text


def counted(count: int, noun: str) -> str:
    """A number and what it counts: "1 token", "12 tokens"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def write(text) -> None:
    """Shows text at once; ends the command quietly if nobody reads on."""
    try:
        sys.stdout.write(shown(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise typer.Exit(unread()) from None


def unread():
    """The exit code where nobody reads on. What is still to be flushed, when the interpreter ends, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
