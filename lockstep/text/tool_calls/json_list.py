"""Calls as Granite 3 and Phi-4-mini write them: <|tool_call|>[{"name": ..., "arguments": {...}}, ...].

Phi-4-mini ends them with <|/tool_call|>; one object may stand there instead of a list.
"""

import json

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import either, json_objects, several
from lockstep.text.tool_calls.readers import after_space, json_array, json_call

BEGIN = "<|tool_call|>"
KEYS = ("arguments", "parameters")


def read(calls):
    """Reads the list of calls, or the one call, after a mark."""
    character = yield from after_space()
    if character == "[":
        yield from json_array(calls, KEYS)
    else:
        yield from json_call(calls, character, KEYS)


def writer(end=""):
    """The function that writes calls as an assistant's message has them. end: the mark after the list."""
    return lambda calls: f"{BEGIN}{json.dumps(list(calls), ensure_ascii=False)}{end}"


def rules(end=""):
    """The function that adds rules `call`, for the list after the mark, and `calls`, for a whole answer of calls."""

    def add(lark, tools, parallel) -> None:
        one = lark.rule("one", either(json_objects(lark, tools, ("name", "arguments"))))
        lark.rule("call", quote("["), several(one, quote(", "), parallel), quote("]"), lark.mark(end) if end else "")
        lark.rule("calls", lark.mark(BEGIN), "call")

    return add
