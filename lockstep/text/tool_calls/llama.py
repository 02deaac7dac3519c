"""{"name": ..., "parameters": {...}} as a whole answer, as Llama 3 writes calls; more of them after semicolons."""

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import either, json_objects, several
from lockstep.text.tool_calls.readers import after_space, json_call

KEYS = ("parameters", "arguments")


def read(calls):
    """Reads one call. Any JSON may be an answer, so nothing else may stand beside the name and its parameters."""
    yield from json_call(calls, (yield from after_space()), KEYS, others=("type", "id"))


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for what follows the mark of one call, and `calls`."""
    lark.rule("call", either(json_objects(lark, tools, ("name", "parameters"))))
    lark.rule("calls", several("call", quote("; "), parallel))
