"""Calls as Llama 3 writes them: {"name": ..., "parameters": {...}} as the whole answer, several with semicolons."""

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import either, json_objects, several
from lockstep.text.tool_calls.readers import after_space, json_call

KEYS = ("parameters", "arguments")


def read(calls):
    """Reads one call. An object with other members than a call has is no call but an ordinary answer in JSON."""
    yield from json_call(calls, (yield from after_space()), KEYS, others=("type", "id"))


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for the text after the mark of one call, and `calls`, for a whole answer of calls."""
    lark.rule("call", either(json_objects(lark, tools, ("name", "parameters"))))
    lark.rule("calls", several("call", quote("; "), parallel))
