"""What the options of these scripts may be. A bad one ends a script with status 2 and one sentence, before any work.

Scripts also run with the interpreters of other engines, so this imports nothing but Python's own modules.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # some scripts take parts of the tests, which nobody installs
Type = Callable[[str], Any]  # argparse's: what an option's text means; ArgumentTypeError if it means nothing
PER_CORE = "at most one for each core"
PANEL = 16  # features that kernels of linear layers write at once; two such panels in a block-diagonal layer


class Parser(argparse.ArgumentParser):
    """Knows a script's options. doc: the script's docstring."""

    def __init__(self, doc: str) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Ends the script. message: names the option, what was given and what is allowed."""
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")

    def add_counts(self, **usual: int) -> None:
        """Options that are whole numbers of at least 1, with what they usually are."""
        for name, count in usual.items():
            self.add_argument(f"--{name}", type=whole_number(), default=count)

    def add_threads(self, usual: int | None = 2) -> None:
        """--threads. usual: how many there are where nothing is said, if there are so many cores."""
        self.add_argument("--threads", type=threads, default=usual and min(usual, num_cores()), help=PER_CORE)

    def check_blocks(self, widths: Mapping[str, int], formats: Mapping[str, int]) -> None:
        """Ends the script unless rows are whole blocks. widths: {what was given: values of a row}; formats: {format:
        weights of a block}."""
        for given, width in widths.items():
            for format, block in formats.items():
                if width % block:
                    self.error(f"{given}: expected a multiple of {block} values for {format}, got {width}")

    def need(self, *modules: str) -> None:
        """Ends the script unless this interpreter has some modules."""
        for module in modules:
            if importlib.util.find_spec(module) is None:
                self.error(f"this interpreter has no {module}: expected one with {', '.join(modules)}")

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """A context in which what Lockstep refuses, such as a model that is not there, ends the script."""
        try:
            yield
        except Exception as error:
            from lockstep.commands.terminal.errors import is_told, sentence

            if not is_told(error):
                raise
            self.error(sentence(error))


def refuse(text: str, allowed: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{text!r}: expected {allowed}")


def num_cores() -> int:
    """Cores that this process may compute on."""
    try:
        from lockstep.native.host import num_cores

        return num_cores()
    except ImportError:  # in the environment of another engine
        return len(os.sched_getaffinity(0))


def whole_number(low: int = 1, high: float = math.inf, why: str = "") -> Type:
    """A whole number. why: what is said behind its limits."""
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        return refuse(text, f"a whole number {limits}{why}")

    return number


def threads(text: str) -> int:
    """Threads: those without a core of their own would be waited for at each barrier."""
    return whole_number(1, num_cores(), f", {PER_CORE}")(text)


def one_of(names: Collection[str]) -> Type:
    """One of some names."""
    return lambda text: text if text in names else refuse(text, f"one of {', '.join(names)}")


def several(kind: Type, or_none: bool = False) -> Type:
    """A list of comma-separated values. or_none: whether it may be empty."""
    return lambda text: [kind(part) for part in text.split(",") if part or not or_none]


def layer_shape(text: str) -> str:
    """The shape of a linear layer: features x values, or features x values x groups for a block-diagonal one."""
    sizes = text.split("x")
    if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        return refuse(text, "features x values or features x values x groups, as 4096x1024 or 8192x4096x8")
    multiple = 2 * PANEL * int(sizes[2]) if sizes[2:] else PANEL
    return refuse(text, f"a multiple of {multiple} features") if int(sizes[0]) % multiple else text


def plain_shape(text: str) -> str:
    """The shape of a linear layer that is not block-diagonal."""
    return refuse(text, "features x values, as 4096x1024") if text.count("x") != 1 else layer_shape(text)


def values_of(shape: str) -> int:
    """How many values of a row each feature of a layer multiplies."""
    return int(shape.split("x")[1])


def folder(text: str) -> pathlib.Path:
    """A folder that exists."""
    return pathlib.Path(text) if os.path.isdir(text) else refuse(text, "a folder that exists")


def file(text: str) -> pathlib.Path:
    """A file that exists."""
    return pathlib.Path(text) if os.path.isfile(text) else refuse(text, "a file that exists")


def new_file(text: str) -> pathlib.Path:
    """A file that can be written, which may exist."""
    path = pathlib.Path(text)
    return path if path.parent.is_dir() and not path.is_dir() else refuse(text, "a file in a folder that exists")


def json_file(text: str) -> pathlib.Path:
    """A file that can be written; if it exists, it is JSON, to which results are added."""
    path = new_file(text)
    try:
        json.loads(path.read_text() if path.exists() else "{}")
    except ValueError:
        refuse(text, "a new file, or one of JSON")
    return path


def program(text: str) -> str:
    """A program that can be started."""
    return text if shutil.which(text) else refuse(text, "a program that exists")
