"""Calls as Mistral's models write them: [TOOL_CALLS] and a JSON array of calls, or (newer) name[ARGS]{...} for each."""

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.events import CallEnd
from lockstep.text.tool_calls.grammar import MAX_CALLS, either, json_objects, several
from lockstep.text.tool_calls.json_text import json_container
from lockstep.text.tool_calls.readers import MAX_NAME, NotACall, after_space, json_array, json_text, object_text

KEYS = ("arguments", "parameters")
CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
ID = "/[A-Za-z0-9]{9}/"  # of a call: these models were trained to write one


def read(calls):
    """Reads the array of calls, or the one call, after a mark."""
    character = yield from after_space()
    if character == "[":
        yield from json_array(calls, KEYS)
    else:
        yield from _named(calls, character)


def _named(calls, character):
    head = ""
    while character not in '{"':
        head += character
        if head.endswith(calls.marks):
            raise CallEnd(calls.marks[0])
        if len(head) > MAX_NAME:
            raise NotACall
        character = yield
    name = head.rstrip().removesuffix(ARGS).partition(CALL_ID)[0].strip()
    if not name or "[" in name:
        raise NotACall
    if character == "{":
        calls.begin(name)
        yield from json_container("{", calls.add, calls.marks)
        return
    arguments = object_text((yield from json_text()))
    calls.begin(name)
    calls.add(arguments)


def rules(lark, tools, parallel) -> None:
    """Adds rules `call`, for the array after the mark, and `calls`, for a whole answer of calls."""
    begin, end = quote(', "id": "'), quote('"')
    objects = json_objects(lark, tools, ("name", "arguments"), f"({begin} {ID} {end})?")
    one = lark.rule("one", either(objects))
    lark.rule("call", quote("["), several(one, quote(", "), parallel), quote("]"))
    lark.rule("calls", lark.mark("[TOOL_CALLS]"), "call")


def named_rules(lark, tools, parallel) -> None:
    """As `rules`, for calls of the form name[ARGS]{...}."""
    options, call_id = [], f"({lark.mark(CALL_ID)} {ID})?"
    for i, tool in enumerate(tools):
        arguments = lark.json(f"tool_{i}_arguments", tool.arguments, tool.strict)
        options.append(lark.rule(f"tool_{i}", quote(tool.name), call_id, lark.mark(ARGS), arguments))
    lark.rule("call", either(options))
    marked = lark.rule("marked", lark.mark("[TOOL_CALLS]"), "call")
    lark.rule("calls", f"{marked}{{1,{MAX_CALLS}}}" if parallel else marked)
