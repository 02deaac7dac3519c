"""Calls as Gemma 4 writes them: <|tool_call>call:name{city:<|"|>Paris<|"|>,days:3}<tool_call|>.

FunctionGemma, a Gemma 3, writes the same with other marks: <start_function_call>, <end_function_call>, <escape>. Names
of members have no quotes, strings stand between two delimiters and have no escapes.
"""

import json
import re

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.events import CallEnd
from lockstep.text.tool_calls.gemma_values import Values, notation
from lockstep.text.tool_calls.grammar import MAX_CALLS, either
from lockstep.text.tool_calls.json_text import json_container
from lockstep.text.tool_calls.members import errors_about_parameters
from lockstep.text.tool_calls.readers import NotACall, after_space, until

CALL = "call:"
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,256}")  # with CALL before it
DELIMITER, ESCAPE = '<|"|>', "<escape>"  # around a string, of Gemma 4 and of FunctionGemma


def reader(delimiter):
    """The function that makes the reader of one call after its mark."""

    def read(calls):
        name, character = "", (yield from after_space())
        while character != "{":
            name += character
            if not NAME.fullmatch(name):
                raise NotACall
            character = yield
        name = name.removeprefix(CALL)
        if not name:
            raise NotACall
        calls.begin(name)
        yield from _arguments(calls, delimiter)

    return read


def _arguments(calls, delimiter):
    """Reads the arguments after their opening bracket, as JSON: with each string in quotes and escaped."""
    as_json = _Reader(json_container("{", calls.add, calls.marks))
    try:
        while True:
            yield from until((delimiter,), as_json.send)
            as_json.send('"')
            yield from until((delimiter,), as_json.send_escaped)
            as_json.send('"')
    except _Ended:
        pass
    except CallEnd as end:
        as_json.throw(end)


class _Ended(Exception):
    """The reader of JSON has read all of it. (A StopIteration may not pass through a generator.)"""


class _Reader:
    """Sends characters to a reader of JSON, until an _Ended."""

    def __init__(self, reader) -> None:
        self._reader = reader
        next(reader)

    def send(self, character) -> None:
        try:
            self._reader.send(character)
        except StopIteration:
            raise _Ended from None

    def send_escaped(self, character) -> None:
        for each in json.dumps(character, ensure_ascii=False)[1:-1]:
            self.send(each)

    def throw(self, end) -> None:
        """Tells the reader about the end of its text, which it raises again, unless it has raised that end itself."""
        self._reader.throw(end)


def writer(begin, end, delimiter):
    """The function that writes calls as an assistant's message has them."""
    return lambda calls: "".join(
        f"{begin}{CALL}{call['name']}{notation(call['arguments'], delimiter)}{end}" for call in calls
    )


def rules(begin, end, delimiter):
    """The function that adds rules `call`, for the text after the mark of one call, and `calls`, for a whole answer."""

    def add(lark, tools, parallel) -> None:
        options = []
        for i, tool in enumerate(tools):
            with errors_about_parameters(tool):
                arguments = Values(lark, f"tool_{i}", tool, delimiter).arguments()
                options.append(lark.rule(f"tool_{i}", quote(f"{CALL}{tool.name}"), arguments))
        lark.rule("call", either(options), lark.mark(end))
        marked = lark.rule("marked", lark.mark(begin), "call")
        lark.rule("calls", f"{marked}{{1,{MAX_CALLS}}}" if parallel else marked)

    return add
