"""The events of a streaming parser: pieces of an answer's text, thoughts and tool calls, in their order."""

import hashlib
import re
import secrets
import string
from typing import NamedTuple, Protocol

ID_CHARACTERS = string.ascii_letters + string.digits


class Content(NamedTuple):
    """A piece of the answer's text. tokens: the tokens of the text, where a request asks for log-probabilities."""

    text: str
    tokens: tuple = ()


class Reasoning(NamedTuple):
    """A piece of the thought that the model wrote before its answer."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins. index: the number of the call in the answer, from 0."""

    index: int
    id: str
    name: str


class Arguments(NamedTuple):
    """A piece of the JSON text of a call's arguments. is_cut: the answer ended within the arguments, and this piece
    completes them."""

    index: int
    text: str
    is_cut: bool = False


Event = Content | Reasoning | CallStart | Arguments


class Parser(Protocol):
    """A streaming parser of an answer's text."""

    @property
    def is_in_call(self) -> bool:
        """Whether the text so far ends inside of a call."""
        ...

    def push(self, text: str, /) -> list[Event]:
        """The events that a piece of text completes."""
        ...

    def finish(self, is_cut: bool = False, /) -> list[Event]:
        """The remaining events, at the end of the answer. is_cut: the answer reached its maximum length."""
        ...


def finish_reason(reason: str, num_calls: int) -> str:
    """Why an answer ended, as OpenAI's API says it: "tool_calls" where it stopped by itself after tool calls."""
    return "tool_calls" if num_calls and reason == "stop" else reason


class CallEnd(Exception):
    """Raised in, or by, a reader whose call ends before it is complete.

    Either the answer has ended, or the reader has met `text`, which begins with a mark and is no part of the call.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.text = text


def new_id() -> str:
    """A new random id for a call: nine letters and digits, as the strictest chat templates (Mistral's) require."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


def short_id(call_id):
    """A client's id for a call, hashed to nine letters and digits unless it already has that form."""
    if call_id and re.fullmatch("[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256((call_id or "").encode()).hexdigest()[:9]


def partial(text, marker):
    """The length of the longest end of the text that is a beginning of the marker, but not all of it."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(marker[:n])), 0)
