"""<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>, as Hermes, Qwen and SmolLM3 write calls."""

from lockstep.serve.tool_calls.grammar import json_object, marked_calls
from lockstep.serve.tool_calls.readers import after_space, json_call

KEYS = ("arguments", "parameters")


def read(calls):
    """Reads one call from behind its mark."""
    yield from json_call(calls, (yield from after_space()), KEYS)


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for what follows the mark of one call, and `calls`."""
    objects = [json_object(lark, f"tool_{i}", tool, ("name", "arguments")) for i, tool in enumerate(tools)]
    marked_calls(lark, objects, parallel)
