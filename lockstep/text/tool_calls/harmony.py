"""Calls as gpt-oss writes them: a message to functions.NAME whose text is the JSON of the arguments.

    <|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

The recipient may also stand before the channel, as chat templates write it. Whatever the order, the parser of channels
(`text/channels.py`) gives this reader the call behind the mark BEGIN.
"""

import re

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import either
from lockstep.text.tool_calls.json_text import json_container
from lockstep.text.tool_calls.readers import NotACall, after_space, name_until

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
FUNCTIONS = "functions."
BEGIN = f"{START}assistant to={FUNCTIONS}"


def read(calls):
    """Reads one call after its mark."""
    name = re.split(r"[\s<]", (yield from name_until(MESSAGE)), maxsplit=1)[0]
    if not name or (yield from after_space()) != "{":
        raise NotACall
    calls.begin(name)
    yield from json_container("{", calls.add, calls.marks)


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for a call behind the mark, and `calls`, for an answer of one call, with which it ends."""
    named = []
    for i, tool in enumerate(tools):
        arguments = lark.json(f"tool_{i}_arguments", tool.arguments, tool.strict)
        head = [quote(f"{tool.name} "), lark.mark(CONSTRAIN), quote("json"), lark.mark(MESSAGE)]
        named.append(lark.rule(f"tool_{i}", *head, arguments))
    lark.rule("call", either(named))
    lark.rule("calls", lark.mark(CHANNEL), quote(f"commentary to={FUNCTIONS}"), "call")
