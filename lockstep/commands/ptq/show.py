"""`lockstep ptq show`: the results of a study so far."""

import pathlib
from typing import Annotated

import typer

from lockstep.commands.ptq.run import show


def command(folder: Annotated[pathlib.Path, typer.Argument(metavar="FOLDER", help="A study's folder.")]) -> None:
    """Print the table of a study's trials, and write its report anew."""
    show(folder)
