"""Entries that a user types into `lockstep chat` or pipes into it: one line each, or several between triple quotes."""

import re
import sys
from collections.abc import Collection, Iterable
from typing import Any, Protocol

QUOTES = '"""'
BEGINS_QUOTED = re.compile(rf"\s*(/\w+[ \t]+)?{QUOTES}")


def is_open(text: str) -> bool:
    """Whether an entry begins with triple quotes, perhaps after a /command, and no line has closed them yet."""
    begin = BEGINS_QUOTED.match(text)
    return begin is not None and _end_of_quotes(text, begin) is None


def _end_of_quotes(text: str, begin: re.Match[str]) -> int | None:
    """Where the line ends that closes the quotes which `begin` has opened; None if there is none yet.

    It is the first that ends with triple quotes when an even number of them has come: the quoted text may be code with
    triple quotes of its own.
    """
    end, number = begin.end(), 1
    for line in text[end:].splitlines(keepends=True):
        end, number = end + len(line), number + line.count(QUOTES)
        if number % 2 == 0 and line.rstrip().endswith(QUOTES):
            return end
    return None


def parsed(entry: str, commands: Collection[str]) -> tuple[str | None, str]:
    """(the name of the /command, or None for a message; the command's argument, or the message).

    Quoted text is taken without its quotes and the line breaks next to them, unless other text follows it: then it is
    code that begins with quotes. Text of several lines that begins with "/" is a message unless the word after it is
    one of `commands`.
    """
    begin = BEGINS_QUOTED.match(entry)
    if begin and _end_of_quotes(entry.rstrip(), begin) == len(entry.rstrip()):
        quoted = entry[begin.end() :].rstrip().removesuffix(QUOTES)
        return (begin[1] or "/").strip()[1:] or None, quoted.strip("\r\n")
    name, *argument = entry[1:].split(None, 1) or [""]
    if entry.startswith("/") and ("\n" not in entry.strip() or name in commands):
        return name, "".join(argument).strip()
    return None, entry.strip("\r\n")


class Entries(Protocol):
    """Where entries come from. is_typed: whether a user types them, who may interrupt an answer and go on."""

    is_typed: bool

    def read(self) -> str | None:
        """The next entry, or None at the end. KeyboardInterrupt ends the command."""
        ...


class PipedEntries:
    """Entries of standard input where it is no terminal."""

    is_typed = False

    def read(self) -> str | None:
        """The next line, or the lines up to the one that closes its quotes. ValueError for quotes that never close."""
        entry = _line()
        while entry is not None and is_open(entry):
            more = _line()
            if more is None:
                raise ValueError(f"standard input ends before the closing {QUOTES} of {entry.splitlines()[0]!r:.60}")
            entry = f"{entry}\n{more}"
        return entry


def _line() -> str | None:
    """The next line of standard input that is UTF-8 text, or None at its end."""
    while True:
        try:
            line = input()
            line.encode()  # UnicodeError for bytes that were not UTF-8, which input() makes lone surrogates
            return line
        except EOFError:
            return None
        except UnicodeError:
            print("that was not UTF-8 text", file=sys.stderr)


class TypedEntries:
    """Entries that are typed or pasted at a prompt of the terminal, with editing, history and completion.

    Enter ends an entry unless its triple quotes are open; Alt-Enter, and a line break in pasted text, never do.
    commands: the names that Tab completes.
    """

    is_typed = True

    def __init__(self, commands: Iterable[str]) -> None:
        from prompt_toolkit import PromptSession  # takes a while to import
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            enable_suspend=True,
            output=_output(),
        )

    def read(self) -> str | None:
        """The next entry; None for Ctrl-D in an empty one. Ctrl-C only drops what was typed."""
        while True:
            try:
                entry = self._session.prompt("> ")
                entry.encode()  # UnicodeError for bytes that were not UTF-8
                return entry
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("(Ctrl-D or /exit ends)", file=sys.stderr)
            except UnicodeError:
                print("that was not UTF-8 text", file=sys.stderr)


def _output() -> Any:
    """prompt_toolkit's output: standard output, or standard error where only that is a terminal. The terminal is not
    asked where its cursor is: not all answer, and what a user types meanwhile would be mixed with the answer. None
    where the terminal can do nothing: prompt_toolkit then only writes what is typed."""
    from prompt_toolkit.output import create_output
    from prompt_toolkit.output.vt100 import Vt100_Output
    from prompt_toolkit.utils import is_dumb_terminal

    if is_dumb_terminal():
        return None
    output = create_output(always_prefer_tty=True)
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False
    return output


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def end_or_break(event: Any) -> None:
        buffer = event.current_buffer
        buffer.insert_text("\n") if is_open(buffer.text) else buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")  # as it comes when it was typed before the prompt was there
    def break_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys
