"""Coroutines that read a call one character at a time.

Each gets characters by `yield` and ends when it has read what it is for. NotACall: the text is something else.
"""

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

from lockstep.text.tool_calls.events import Arguments, CallStart, new_id
from lockstep.text.tool_calls.json_text import CLOSING, SPACE, json_container, json_string, json_value
from lockstep.text.tool_calls.tools import Tool

NOTHING = ("null", "None")
MAX_NAME = 256


class NotACall(Exception):
    """The text that was read is no call: it belongs to the answer's content."""


Reader = Generator[None, str, Any]


class Calls:
    """The calls of an answer so far; readers add to them. most: how many of them are told; None: all. marks: texts that
    are no part of a call's JSON, unless they stand in a string."""

    def __init__(self, tools: Sequence[Tool], most: int | None = None, marks: tuple[str, ...] = ()) -> None:
        self.tools, self.count, self.marks, self._most = tools, 0, marks, most
        self.events: list[CallStart | Arguments] = []
        self._pieces: list[str] = []
        self._memory: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        """The next call begins."""
        self.flush()
        self.events.append(CallStart(self.count, new_id(), name))
        self.count += 1

    def add(self, text: str) -> None:
        """More of the JSON text of the arguments of the call that began last."""
        self._pieces.append(text)

    def flush(self) -> None:
        """Makes an event of the text that was added."""
        if self._pieces:
            self.events.append(Arguments(self.count - 1, "".join(self._pieces)))
            self._pieces.clear()

    def take(self) -> list[CallStart | Arguments]:
        """The events since the last time."""
        self.flush()
        taken, self.events = self.events, []
        return taken if self._most is None else [event for event in taken if event.index < self._most]

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` made when it was first asked for under this key."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]


def after_space() -> Generator[None, str, str]:
    """The next character that is not white space."""
    while (character := (yield)) in SPACE:
        pass
    return character


def expect(text: str) -> Generator[None, str, None]:
    """Reads exactly this text."""
    for wanted in text:
        if (yield) != wanted:
            raise NotACall


def until(markers: Sequence[str], out: Callable[[str], Any]) -> Generator[None, str, str]:
    """Passes on to `out` what comes before a marker, which is read, too; returns the marker."""
    held = ""
    while True:
        held += yield
        if held in markers:
            return held
        while held and not any(marker.startswith(held) for marker in markers):
            out(held[0])
            held = held[1:]


def name_until(marker: str) -> Generator[None, str, str]:
    """A name that ends with a marker."""
    name = []
    yield from until((marker,), lambda character: _bounded(name, character))
    return "".join(name)


def _bounded(pieces: list[str], character: str) -> None:
    pieces.append(character)
    if len(pieces) > MAX_NAME:
        raise NotACall


def json_text() -> Generator[None, str, str]:
    """The rest of a JSON string after its opening quote, decoded."""
    pieces = []
    yield from json_string(pieces.append)
    try:
        return json.loads("".join(pieces))
    except ValueError:
        raise NotACall from None


def json_call(calls: Calls, opening: str, keys: Sequence[str], others: Sequence[str] | None = None) -> Reader:
    """The rest of {"name": ..., <one of keys>: {...}} after its opening bracket; returns the bracket that ended it.

    The members may come in any order; arguments that come after the name are passed on as they are read, and what
    follows them is read as anything like JSON. others: names of the members that there may be besides; None: any.
    """
    if opening != "{":
        raise NotACall
    member = _Member(calls, keys, others)
    character = yield from after_space()
    while character != "}":
        if character != '"':
            raise NotACall
        key = yield from json_text()
        if (yield from after_space()) != ":":
            raise NotACall
        character = yield from member.read(key, (yield from after_space()))
        if member.is_told:
            return (yield from _rest_of_call(calls, character))
        if character == ",":
            character = yield from after_space()
        elif character != "}":
            raise NotACall
    member.finish(needs_arguments=others is not None)
    return "}"


def _rest_of_call(calls: Calls, character: str) -> Reader:
    """Reads what follows the arguments of a call up to the bracket that ends it, which is returned."""
    if character == "/":
        character = yield from after_comment()
    if character == ",":
        yield from json_container("{", ignore, calls.marks)
        return "}"
    if character not in "}]":
        raise NotACall
    return character


def after_comment() -> Generator[None, str, str]:
    """The next character that is not white space after a comment, of which the first slash has been read."""
    yield from expect("/")
    yield from until(("\n",), ignore)
    return (yield from after_space())


class _Member:
    """What is known of a call while its members are read."""

    def __init__(self, calls: Calls, keys: Sequence[str], others: Sequence[str] | None) -> None:
        self._calls, self._keys, self._others = calls, keys, others
        self._name, self._early, self.is_told = "", [], False

    def read(self, key: str, first: str) -> Reader:
        """Reads a member's value, whose first character is there; returns the character after it."""
        if key == "name" and first == '"' and not self._name:
            self._name = yield from json_text()
        elif key in self._keys and not self._early:
            return (yield from self._arguments(first))
        elif self._others is not None and key not in ("name", *self._keys, *self._others):
            raise NotACall
        else:
            return (yield from _skip_value(first))
        return (yield from after_space())

    def _arguments(self, first: str) -> Reader:
        """Reads the arguments; returns the character after them."""
        if first == '"':
            self._early.append(object_text((yield from json_text())))
        elif first == "{":
            out = self._early.append
            if self._name:
                self._begin()
                out = self._calls.add
            yield from json_container(first, out, self._calls.marks)
        else:
            word, character = yield from _bare(first)
            if word not in NOTHING:
                raise NotACall
            self._early.append("{}")
            return character
        return (yield from after_space())

    def _begin(self) -> None:
        self._calls.begin(self._name)
        self.is_told = True

    def finish(self, needs_arguments: bool) -> None:
        """Tells of a call whose arguments came before its name, or were no object, or are none."""
        if not self._name or (needs_arguments and not self._early):
            raise NotACall
        self._begin()
        self._calls.add("".join(self._early) or "{}")


def object_text(text: str) -> str:
    """Arguments that were written as a string, as the text of an object."""
    if not text.strip() or text.strip() in NOTHING:
        return "{}"
    value = json_value(text, None)
    if not isinstance(value, dict):
        raise NotACall
    return json.dumps(value, ensure_ascii=False)


def _skip_value(first: str) -> Reader:
    """Reads a JSON value that nobody needs; returns the character after it."""
    if first == '"':
        yield from json_string(ignore)
    elif first in CLOSING:
        yield from json_container(first, ignore)
    else:
        return (yield from _bare(first))[1]
    return (yield from after_space())


def _bare(first: str) -> Generator[None, str, tuple[str, str]]:
    """A value without quotes, and the character after it that is no white space."""
    word = first
    while (character := (yield)) not in ",}" + SPACE:
        word += character
        if len(word) > MAX_NAME:
            raise NotACall
    return word, character if character not in SPACE else (yield from after_space())


def ignore(_: str) -> None:
    """For what nobody needs."""
