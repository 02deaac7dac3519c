"""<tool_call><function=name><parameter=key>value</parameter></function></tool_call>, as Qwen3-Coder and Qwen3.5 write.

Values stand there as plain text: what is a string and what is JSON only the tool's schema tells.
"""
import json

from lockstep.serve.structured import quote
from lockstep.serve.tool_calls.grammar import either, several
from lockstep.serve.tool_calls.readers import NotACall, after_space, expect, name_until, until
from lockstep.serve.tool_calls.texts import alternatives, is_null, is_string, text_rule

FUNCTION, PARAMETER, END = "function=", "parameter=", "</parameter>"
NOTHING = ("null", "None")
LITERALS = {"True": True, "False": False, "None": None}


def read(calls):
    """Reads one call from behind its mark."""
    if (yield from after_space()) != "<":
        raise NotACall
    yield from expect(FUNCTION)
    name = (yield from name_until(">")).strip()
    calls.begin(name)
    schema = next((tool.parameters for tool in calls.tools if tool.name == name), {})
    calls.add("{")
    yield from _parameters(calls, schema)
    calls.add("}")


def _parameters(calls, schema):
    """Reads parameters up to </function>. schema: of all arguments."""
    separator, properties = "", schema.get("properties")
    while True:
        if (yield from after_space()) != "<":
            continue
        character = yield
        if character == "/":
            return (yield from until(">", lambda _: None))
        if character != PARAMETER[0]:
            raise NotACall
        yield from expect(PARAMETER[1:])
        key = (yield from name_until(">")).strip()
        calls.add(f"{separator}{json.dumps(key)}: ")
        separator = ", "
        known = properties.get(key) if isinstance(properties, dict) else None
        yield from _value(calls, alternatives(known, schema))


def _value(calls, kinds):
    if all(map(is_string, kinds)):
        calls.add('"')
        yield from until(END, Lines(lambda text: calls.add(json.dumps(text)[1:-1])).add)
        calls.add('"')
    else:
        pieces = []
        yield from until(END, Lines(pieces.append).add)
        calls.add(json.dumps(_decoded("".join(pieces), kinds)))


class Lines:
    """Passes characters on without the line break that follows <parameter=key> and the one before its end."""

    def __init__(self, out):
        self._out, self._held, self._first = out, "", True

    def add(self, character):
        """Takes the next character."""
        if self._held:
            self._out(self._held)
        self._held = character if character == "\n" and not self._first else ""
        if character != "\n":
            self._out(character)
        self._first = False


def _decoded(text, kinds):
    """The value that a text stands for; the text itself where it is no JSON, or may be nothing else but null."""
    if is_text(kinds) and text.strip() not in NOTHING:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return LITERALS.get(text.strip(), text)


def rules(lark, tools, parallel):
    """Adds rules `call`, for what follows the mark of one call, and `calls`. Parameters come in the schema's order."""
    made = [_function(lark, f"tool_{i}", tool) for i, tool in enumerate(tools)]
    lark.rule("call", quote("\n"), either(made), quote("\n"), lark.mark("</tool_call>"))
    marked = lark.rule("marked", lark.mark("<tool_call>"), "call")
    lark.rule("calls", several(marked, quote("\n"), parallel))


def _function(lark, name, tool):
    properties, required = tool.parameters.get("properties") or {}, tool.parameters.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ValueError(f"tools: parameters of {tool.name}: expected an object of properties and a list of required")
    parts = []
    for i, (key, schema) in enumerate(properties.items()):
        made = _parameter(lark, f"{name}_{i}", key, schema, tool)
        parts.append(made if key in required else f"{made}?")
    return lark.rule(name, quote(f"<function={tool.name}>\n"), *parts, quote("</function>"))


def is_text(kinds):
    """Whether a value of these alternatives stands there without quotes: it is a string, or perhaps null."""
    return any(map(is_string, kinds)) and all(is_string(kind) or is_null(kind) for kind in kinds)


def _parameter(lark, name, key, schema, tool):
    head, kinds, end = quote(f"<parameter={key}>\n"), alternatives(schema, tool.parameters), f"\n{END}\n"
    if not is_text(kinds):
        shared = {word: tool.parameters[word] for word in ("$defs", "definitions") if word in tool.parameters}
        value = lark.json(f"{name}_value", {**shared, **schema}, tool.strict)
        return lark.rule(name, head, value, quote(end))
    texts = [text_rule(lark, f"{name}_{i}", kind, tool.strict, end) for i, kind in enumerate(kinds)]
    return lark.rule(name, head, either(texts))
