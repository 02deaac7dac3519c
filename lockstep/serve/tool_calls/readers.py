"""Coroutines that read a call one character at a time.

Each gets characters by `yield` and ends when it has read what it is for. NotACall: the text is something else.
"""
import json

from lockstep.serve.tool_calls.events import Arguments, CallStart, new_id

SPACE = " \t\r\n"
CLOSING = {"{": "}", "[": "]"}
MAX_NAME = 256


class NotACall(Exception):
    """The text that was read is no call: it belongs to the answer's content."""


class Calls:
    """The calls of an answer so far; readers add to them. most: how many of them are told; None: all."""

    def __init__(self, tools, most=None):
        self.tools, self.events, self.count, self._most = tools, [], 0, most
        self._pieces = []

    def begin(self, name):
        """The next call begins."""
        self.flush()
        self.events.append(CallStart(self.count, new_id(), name))
        self.count += 1

    def add(self, text):
        """More of the JSON text of the arguments of the call that began last."""
        self._pieces.append(text)

    def flush(self):
        """Makes an event of the text that was added."""
        if self._pieces:
            self.events.append(Arguments(self.count - 1, "".join(self._pieces)))
            self._pieces.clear()

    def take(self):
        """The events since the last time."""
        self.flush()
        taken, self.events = self.events, []
        return taken if self._most is None else [event for event in taken if event.index < self._most]


def after_space():
    """The next character that is not white space."""
    while (character := (yield)) in SPACE:
        pass
    return character


def expect(text):
    """Reads exactly this text."""
    for wanted in text:
        if (yield) != wanted:
            raise NotACall


def until(marker, out):
    """Passes on to `out` what comes before a marker, which is read, too."""
    held = ""
    while True:
        held += yield
        if held == marker:
            return
        while held and not marker.startswith(held):
            out(held[0])
            held = held[1:]


def name_until(marker):
    """A name that ends with a marker."""
    name = []
    yield from until(marker, lambda character: _bounded(name, character))
    return "".join(name)


def _bounded(pieces, character):
    pieces.append(character)
    if len(pieces) > MAX_NAME:
        raise NotACall


def json_string(out):
    """The rest of a JSON string after its opening quote, as it is written."""
    while True:
        character = yield
        out(character)
        if character == '"':
            return
        if character == "\\":
            out((yield))


def json_container(opening, out):
    """The rest of a JSON object or array after its opening bracket, as it is written."""
    out(opening)
    open_brackets = [CLOSING[opening]]
    while open_brackets:
        character = yield
        out(character)
        if character == '"':
            yield from json_string(out)
        elif character in CLOSING:
            open_brackets.append(CLOSING[character])
        elif character in "}]" and character != open_brackets.pop():
            raise NotACall


def json_text():
    """The rest of a JSON string after its opening quote, decoded."""
    pieces = ['"']
    yield from json_string(pieces.append)
    try:
        return json.loads("".join(pieces), strict=False)
    except ValueError:
        raise NotACall from None


def json_call(calls, opening, keys, others=None):
    """The rest of {"name": ..., <one of keys>: {...}} after its opening bracket.

    The members may come in any order; arguments that come after the name are passed on as they are read. others: names
    of the members that there may be besides; None: any.
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
        if character == ",":
            character = yield from after_space()
        elif character != "}":
            raise NotACall
    member.finish(needs_arguments=others is not None)


class _Member:
    """What is known of a call while its members are read."""

    def __init__(self, calls, keys, others):
        self._calls, self._keys, self._others = calls, keys, others
        self._name, self._early, self._begun = None, [], False

    def read(self, key, first):
        """Reads a member's value, whose first character is there; returns the character after it."""
        if key == "name" and first == '"' and self._name is None:
            self._name = yield from json_text()
        elif key in self._keys and not self._begun and not self._early:
            yield from self._arguments(first)
        elif self._others is not None and key not in self._others:
            raise NotACall
        else:
            return (yield from _skip_value(first))
        return (yield from after_space())

    def _arguments(self, first):
        if first == '"':
            self._early.append((yield from json_text()))
        elif first != "{":
            raise NotACall
        elif self._name is None:
            yield from json_container(first, self._early.append)
        else:
            self._begin()
            yield from json_container(first, self._calls.add)

    def _begin(self):
        self._calls.begin(self._name)
        self._begun = True

    def finish(self, needs_arguments):
        if not self._name or needs_arguments and not (self._begun or self._early):
            raise NotACall
        if not self._begun:
            self._begin()
            self._calls.add("".join(self._early) or "{}")


def _skip_value(first):
    """Reads a JSON value that nobody needs; returns the character after it."""
    if first == '"':
        yield from json_string(_ignore)
    elif first in CLOSING:
        yield from json_container(first, _ignore)
    else:
        while (character := (yield)) not in ",}" + SPACE:
            pass
        return character if character not in SPACE else (yield from after_space())
    return (yield from after_space())


def _ignore(_):
    pass
