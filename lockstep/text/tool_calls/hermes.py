"""Calls as Hermes, Qwen and SmolLM3 write them: <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>."""

from lockstep.text.tool_calls.grammar import json_objects, marked_calls
from lockstep.text.tool_calls.readers import after_space, json_call

KEYS = ("arguments", "parameters")


def read(calls):
    """Reads one call after its mark."""
    yield from json_call(calls, (yield from after_space()), KEYS)


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for the text after the mark of one call, and `calls`, for a whole answer of calls."""
    marked_calls(lark, json_objects(lark, tools, ("name", "arguments")), parallel)
