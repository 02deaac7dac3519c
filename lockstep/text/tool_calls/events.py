"""What a parser finds in an answer: pieces of text and of tool calls, in the order in which they come."""

import hashlib
import re
import secrets
import string
from typing import NamedTuple, Protocol

ID_CHARACTERS = string.ascii_letters + string.digits


class Content(NamedTuple):
    """A piece of the answer's text. tokens: those that it came from, where somebody asks for them (http/placed.py)."""

    text: str
    tokens: tuple = ()


class Reasoning(NamedTuple):
    """A piece of what the model thought before it answered."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins. index: its number in the answer."""

    index: int
    id: str
    name: str


class Arguments(NamedTuple):
    """A piece of the JSON text of a call's arguments. is_cut: it is not the model's: the answer ended within them."""

    index: int
    text: str
    is_cut: bool = False


Event = Content | Reasoning | CallStart | Arguments


class Parser(Protocol):
    """What reads the text of an answer."""

    def push(self, text: str, /) -> list[Event]:
        """The events that a piece of text completes."""
        ...

    def finish(self, is_cut: bool = False, /) -> list[Event]:
        """Those that were held back, now that nothing follows. is_cut: the answer was as long as it might be."""
        ...


class CallEnd(Exception):
    """What is being read ends here, though it is not complete: with the answer, or at text that is no part of it, which
    has been read and begins with a mark."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.text = text


def new_id() -> str:
    """A fresh id for a call: nine letters and digits, which is what the strictest chat templates (Mistral's) accept."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


def short_id(call_id):
    """Any client's id for a call as one that those templates accept; ours stay as they are."""
    if call_id and re.fullmatch("[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256((call_id or "").encode()).hexdigest()[:9]


def partial(text, marker):
    """How many characters at the end of a text could begin a marker, without being all of it."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(marker[:n])), 0)
