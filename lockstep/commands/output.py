"""Writing an answer to standard output."""
import os
import sys

import typer

PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended


def write(text):
    """Shows text at once; ends the command quietly if nobody reads on."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise typer.Exit(unread()) from None


def unread():
    """The exit code where nobody reads on. What is still to be flushed, when the interpreter ends, goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
