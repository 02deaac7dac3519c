"""Calls as Hermes, Qwen and SmolLM3 write them: <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>."""

import json

from lockstep.text.tool_calls.grammar import json_objects, marked_calls
from lockstep.text.tool_calls.readers import after_space, json_call

KEYS = ("arguments", "parameters")
MARKS = ("<tool_call>", "</tool_call>")


def read(calls):
    """Reads one call after its mark."""
    yield from json_call(calls, (yield from after_space()), KEYS)


def write(calls) -> str:
    """The calls, each {"name", "arguments"}, as an assistant's message has them."""
    texts = [json.dumps(dict(name=call["name"], arguments=call["arguments"]), ensure_ascii=False) for call in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for the text after the mark of one call, and `calls`, for a whole answer of calls."""
    marked_calls(lark, json_objects(lark, tools, ("name", "arguments")), parallel, MARKS)
