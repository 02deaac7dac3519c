"""<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>, as Hermes, Qwen and SmolLM3 write calls."""

from lockstep.text.tool_calls.grammar import json_objects, marked_calls
from lockstep.text.tool_calls.readers import after_space, json_call

KEYS = ("arguments", "parameters")


def read(calls):
    """Reads one call from behind its mark."""
    yield from json_call(calls, (yield from after_space()), KEYS)


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for what follows the mark of one call, and `calls`."""
    marked_calls(lark, json_objects(lark, tools, ("name", "arguments")), parallel)
