"""Repairs JSON that a model writes, one character at a time, to valid JSON.

Valid JSON passes unchanged, but for halves of characters (a lone \\ud83d), which are no text, and numbers beyond
float64. Trailing and missing commas, raw line breaks in strings, single or missing quotes, Python's constants and
brackets that do not match are repaired. Readers are coroutines: see readers.py.
"""

import json
import re
from collections.abc import Callable, Generator
from contextlib import suppress
from math import isfinite

from lockstep.text.tool_calls.events import CallEnd

Out = Callable[[str], object]
Reader = Generator[None, str, None]

SPACE = " \t\r\n"
CLOSING = {"{": "}", "[": "]"}
CONSTANTS = {"true": "true", "True": "true", "false": "false", "False": "false"} | dict.fromkeys(
    ("null", "None", "undefined", "NaN", "Infinity", "-Infinity"), "null"
)
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
NEARLY_NUMBER = re.compile(r"[+-]?([1-9][0-9]*\.?|0?\.[0-9]+|[1-9][0-9]*\.[0-9]+)")
LONE = "\\ufffd"  # stands for half of a character
KEY, COLON, VALUE, END = range(4)  # what comes next: a key, the colon after it, a value, a comma or bracket after it


def json_container(opening: str, out: Out, marks: tuple[str, ...] = ()) -> Reader:
    """Reads the rest of a JSON object or array after its opening bracket. `out` is called with pieces of the whole
    object or array, repaired.

    A mark outside of strings, or a CallEnd thrown into the coroutine, ends it early: the missing brackets are written,
    and a CallEnd is raised.
    """
    writer, source, character = _Writer(out), _Source(marks), ""
    writer.open(opening)
    while writer.is_open and (character := character or (yield from source.next())):
        if character in "\"'":
            writer.value()
            yield from source.string(out, character)
            writer.ended()
        elif character in PUNCTUATION or character.isspace():
            PUNCTUATION.get(character, _Writer.space)(writer, character)
        else:
            word, character = yield from source.word(character, ":" if writer.wants_key else "")
            writer.value()
            out(_repaired_word(word, writer.expects == KEY))
            writer.ended()
            continue
        character = ""
    writer.close_all()
    if source.end is not None:
        raise source.end


class _Source:
    """The characters of a text up to a mark outside of strings. end: the CallEnd that ended the text, or None."""

    def __init__(self, marks) -> None:
        self._marks, self._read_ahead, self.end = marks, "", None

    def next(self):
        """The next character; empty at the end of the text."""
        try:
            read = yield from self._character()
            while read not in self._marks and any(mark.startswith(read) for mark in self._marks):
                read += yield from self._character()
        except CallEnd as end:
            self.end = end
        if self.end is None and read in self._marks:
            self.end = CallEnd(read)
        if self.end is not None:
            return ""
        self._read_ahead = read[1:] + self._read_ahead
        return read[0]

    def _character(self):
        if self.end is not None:
            raise self.end
        if not self._read_ahead:
            return (yield)
        first, self._read_ahead = self._read_ahead[0], self._read_ahead[1:]
        return first

    def string(self, out, quote):
        """Reads the rest of a string after its quote. No mark has a quote in it, so nothing has been read ahead."""
        try:
            yield from json_string(out, quote)
        except CallEnd as end:
            self.end = end

    def word(self, first, ends):
        """(a value or key without quotes, the character after it). ends: further characters that end it."""
        pieces = [first]
        while (character := (yield from self.next())) and character not in ',{}[]"\n' + ends:
            pieces.append(character)
        return "".join(pieces).strip(), character


class _Writer:
    """Writes repaired JSON: adds missing commas, colons, keys and brackets, and drops a comma that nothing follows."""

    def __init__(self, out) -> None:
        self._out, self._open, self._comma, self.expects = out, [], "", VALUE

    @property
    def is_open(self) -> bool:
        return bool(self._open)

    @property
    def wants_key(self) -> bool:
        return self.expects == KEY or (self.expects == END and self._open[-1] == "}")

    def _next(self) -> None:
        self.expects = KEY if self._open[-1] == "}" else VALUE

    def value(self) -> None:
        """A key or a value begins."""
        if self.expects == END:
            self._comma = ", "
            self._next()
        self._out(self._comma)
        if self.expects == COLON:
            self._out(": ")
            self.expects = VALUE
        self._comma = ""

    def ended(self) -> None:
        """A key, or a value that is no object or array, has been written."""
        self.expects = COLON if self.expects == KEY else END

    def open(self, character) -> None:
        self.value()
        if self.expects == KEY:
            self._out('"": ')
        self._out(character)
        self._open.append(CLOSING[character])
        self._next()

    def close(self, character) -> None:
        if character not in self._open:
            return
        closed = ""
        while closed != character:
            self._complete()
            closed = self._open.pop()
            self._out(closed)
            self.expects, self._comma = END, ""

    def close_all(self) -> None:
        """Writes the closing brackets of all open objects and arrays."""
        while self._open:
            self.close(self._open[-1])

    def comma(self, character) -> None:
        self._complete()
        if self.expects == END:
            self._comma = character
            self._next()

    def colon(self, character) -> None:
        if self.expects == COLON:
            self._out(character)
            self.expects = VALUE

    def space(self, character) -> None:
        character = character if character in SPACE else " "
        if self._comma:
            self._comma += character
        else:
            self._out(character)

    def _complete(self) -> None:
        """Writes null if the last member has a key but no value."""
        if self._open[-1] == "}" and self.expects in (COLON, VALUE):
            self._out("null" if self.expects == VALUE else ": null")
            self.expects = END


PUNCTUATION = {
    "{": _Writer.open,
    "[": _Writer.open,
    "}": _Writer.close,
    "]": _Writer.close,
    ",": _Writer.comma,
    ":": _Writer.colon,
}


def json_string(out: Out, quote: str = '"') -> Reader:
    """Reads the rest of a string after its opening quote. `out` is called with pieces of the whole JSON string, which
    is closed even if a CallEnd is thrown in."""
    out('"')
    try:
        character = yield
        while character != quote:
            if character == "\\":
                character = (yield from _escape(out)) or (yield)
            else:
                out(json.dumps(character, ensure_ascii=False)[1:-1])
                character = yield
    except CallEnd:
        out('"')
        raise
    out('"')


def _escape(out):
    """Reads the escape after a backslash. Returns None, or, if it was no valid escape, the character that was read
    instead, which may be the closing quote."""
    return (yield from _escaped(out, (yield)))


def _escaped(out, character):
    """As `_escape`, but the character after the backslash has been read."""
    if character == "u":
        return (yield from _code(out))
    if character in '"\\/bfnrt':
        out("\\" + character)
    elif character in "'\n":
        out(json.dumps(character)[1:-1])
    else:  # such as \d of a regular expression: the backslash was meant literally
        out("\\\\")
        return character
    return None


def _code(out):
    """Reads the digits after \\u, and behind the first half of a character also its second half. A half alone becomes
    LONE."""
    first = ""
    while True:
        digits, character = yield from _digits()
        if character:
            out(f"{LONE if first else ''}\\\\u{digits}")
            return character
        is_first, is_second = "d800" <= digits.lower() < "dc00", "dc00" <= digits.lower() < "e000"
        if first and is_second:
            out(f"\\u{first}\\u{digits}")
            return None
        out(LONE if first else "")
        if not is_first:
            out(LONE if is_second else f"\\u{digits}")
            return None
        first, character = digits, (yield)
        if character != "\\":
            out(LONE)
            return character
        character = yield
        if character != "u":
            out(LONE)
            return (yield from _escaped(out, character))


def _digits():
    """(up to four hexadecimal digits, the character after them if they are fewer, or empty)."""
    digits = ""
    while len(digits) < 4:
        character = yield
        if character not in "0123456789abcdefABCDEF":
            return digits, character
        digits += character
    return digits, ""


def _repaired_word(word, is_key):
    if not is_key:
        if NUMBER.fullmatch(word):
            return word if word.lstrip("-").isdecimal() or isfinite(float(word)) else "null"
        if word in CONSTANTS:
            return CONSTANTS[word]
        if NEARLY_NUMBER.fullmatch(word) and len(word) < 20:
            return json.dumps(float(word))
    return json.dumps(word, ensure_ascii=False)


def json_value(text: str, default: object, is_cut: bool = False) -> object:
    """The value of a JSON text, repaired if necessary; `default` if it cannot be.

    is_cut: the text may be the beginning of an object or array, which is then completed.
    """
    for candidate in (text, repaired(text, is_cut)):
        try:
            value = json.loads(candidate, parse_constant=_refuse)
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            return value
        except (ValueError, RecursionError):
            pass
    return default


def repaired(text: str, is_cut: bool = False) -> str:
    """The JSON object or array in a text, repaired; empty if the text does not begin with a bracket, has more after the
    end, or (unless is_cut) has no end."""
    text, pieces = text.strip(), []
    if not text or text[0] not in CLOSING:
        return ""
    reader = json_container(text[0], pieces.append)
    next(reader)
    for at, character in enumerate(text[1:], 2):
        try:
            reader.send(character)
        except StopIteration:
            return "".join(pieces) if at == len(text) else ""
    if is_cut:
        with suppress(CallEnd):
            reader.throw(CallEnd())
    return "".join(pieces) if is_cut else ""


def _refuse(constant):
    raise ValueError(f"{constant} is not JSON")
