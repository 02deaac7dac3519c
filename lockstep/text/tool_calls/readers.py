"""Coroutines (generators) that read a call one character at a time.

Each receives characters by `yield` and returns at the end of the part that it reads. It raises NotACall if the text is
no call.
"""

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

from lockstep.text.tool_calls.events import Arguments, CallStart, new_id
from lockstep.text.tool_calls.json_text import CLOSING, SPACE, json_container, json_string, json_value
from lockstep.text.tool_calls.tools import Tool

NOTHING = ("null", "None")  # how models write null
MAX_NAME = 256


class NotACall(Exception):
    """The text that was read is no call; it belongs to the answer's content."""


Reader = Generator[None, str, Any]


class Calls:
    """The calls of an answer so far; readers add to them.

    tools: of the request. max_calls: the number of calls that have events; None: all. marks: texts that end a call's
    JSON, except inside of a string.
    """

    def __init__(self, tools: Sequence[Tool], max_calls: int | None = None, marks: tuple[str, ...] = ()) -> None:
        self.tools, self.num_calls, self.marks, self._max_calls = tools, 0, marks, max_calls
        self.events: list[CallStart | Arguments] = []
        self._pieces: list[str] = []
        self._memory: dict[str, Any] = {}

    def begin(self, name: str) -> None:
        """Begins the next call."""
        self.flush()
        self.events.append(CallStart(self.num_calls, new_id(), name))
        self.num_calls += 1

    def add(self, text: str) -> None:
        """Adds to the JSON text of the last call's arguments."""
        self._pieces.append(text)

    def flush(self) -> None:
        """Makes an Arguments event of the text added since the last one."""
        if self._pieces:
            self.events.append(Arguments(self.num_calls - 1, "".join(self._pieces)))
            self._pieces.clear()

    def take(self) -> list[CallStart | Arguments]:
        """Returns and removes the events so far."""
        self.flush()
        taken, self.events = self.events, []
        return taken if self._max_calls is None else [event for event in taken if event.index < self._max_calls]

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of make(), computed once for each key."""
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
    for expected in text:
        if (yield) != expected:
            raise NotACall


def until(markers: Sequence[str], out: Callable[[str], Any]) -> Generator[None, str, str]:
    """Reads up to and with the first marker, which is returned; `out` is called with each character before it."""
    held = ""
    while True:
        held += yield
        if held in markers:
            return held
        while held and not any(marker.startswith(held) for marker in markers):
            out(held[0])
            held = held[1:]


def name_until(marker: str) -> Generator[None, str, str]:
    """The name before a marker. NotACall if it is longer than MAX_NAME."""
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
    """Reads the rest of a call {"name": ..., <one of keys>: {...}} after its opening bracket; returns the bracket that
    ended it.

    The members may come in any order. Arguments that come after the name are streamed, and the rest of the object after
    them is skipped. others: names of further members that are allowed; None: any.
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
        if member.is_begun:
            return (yield from _rest_of_call(calls, character))
        if character == ",":
            character = yield from after_space()
        elif character != "}":
            raise NotACall
    member.finish(needs_arguments=others is not None)
    return "}"


def json_array(calls: Calls, keys: Sequence[str]) -> Reader:
    """Reads the rest of an array of calls after its opening bracket. keys: as for `json_call`."""
    num_before, opening = calls.num_calls, (yield from after_space())
    while opening != "]" or calls.num_calls == num_before:
        try:
            end = yield from json_call(calls, opening, keys)
        except NotACall:
            if calls.num_calls == num_before or opening != "{":
                raise
            return (yield from json_container("[", ignore, calls.marks))
        opening = end if end == "]" else (yield from after_space())
        while opening in ",}/":
            opening = yield from (after_comment() if opening == "/" else after_space())


def _rest_of_call(calls: Calls, character: str) -> Reader:
    """Skips the text after the arguments of a call, up to the bracket that ends the call, which is returned."""
    if character == "/":
        character = yield from after_comment()
    if character == ",":
        yield from json_container("{", ignore, calls.marks)
        return "}"
    if character not in "}]":
        raise NotACall
    return character


def after_comment() -> Generator[None, str, str]:
    """The next character after a comment that is not white space. The comment's first slash has been read."""
    yield from expect("/")
    yield from until(("\n",), ignore)
    return (yield from after_space())


class _Member:
    """The members of a call that have been read. is_begun: whether the call has been added to Calls."""

    def __init__(self, calls: Calls, keys: Sequence[str], others: Sequence[str] | None) -> None:
        self._calls, self._keys, self._others = calls, keys, others
        self._name, self._early, self.is_begun = "", [], False

    def read(self, key: str, first: str) -> Reader:
        """Reads a member's value, whose first character has been read; returns the character after the value."""
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
        self.is_begun = True

    def finish(self, needs_arguments: bool) -> None:
        """Adds a call whose arguments came before its name, were written as a string or null, or are missing."""
        if not self._name or (needs_arguments and not self._early):
            raise NotACall
        self._begin()
        self._calls.add("".join(self._early) or "{}")


def object_text(text: str) -> str:
    """The JSON text of arguments that the model wrote as a string instead of an object."""
    if not text.strip() or text.strip() in NOTHING:
        return "{}"
    value = json_value(text, None)
    if not isinstance(value, dict):
        raise NotACall
    return json.dumps(value, ensure_ascii=False)


def _skip_value(first: str) -> Reader:
    """Skips a JSON value, whose first character has been read; returns the character after it."""
    if first == '"':
        yield from json_string(ignore)
    elif first in CLOSING:
        yield from json_container(first, ignore)
    else:
        return (yield from _bare(first))[1]
    return (yield from after_space())


def _bare(first: str) -> Generator[None, str, tuple[str, str]]:
    """(a value without quotes, the next character after it that is not white space)."""
    word = first
    while (character := (yield)) not in ",}" + SPACE:
        word += character
        if len(word) > MAX_NAME:
            raise NotACall
    return word, character if character not in SPACE else (yield from after_space())


def ignore(_: str) -> None:
    """An `out` that drops the text."""
