"""Calls as Qwen3-Coder and Qwen3.5 write them:
<tool_call><function=name><parameter=key>value</parameter></function></tool_call>.

Seed-OSS writes the same with another mark, and without line breaks around values. Values are plain text: only the
tool's schema says whether a value is a string or JSON.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lockstep.text.grammars.schemas import self_contained
from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.events import CallEnd
from lockstep.text.tool_calls.grammar import either, marked_calls
from lockstep.text.tool_calls.json_text import json_value, repaired
from lockstep.text.tool_calls.members import Members, errors_about_parameters
from lockstep.text.tool_calls.readers import MAX_NAME, NOTHING, NotACall, after_space, expect, ignore, name_until, until
from lockstep.text.tool_calls.shapes import kinds, shapes
from lockstep.text.tool_calls.texts import END, alternatives, is_null, is_text, text_rule

FUNCTION, PARAMETER, FUNCTION_END = "function=", "parameter=", "</function>"
PARAMETER_TAG = re.compile(r"parameter(=(?P<key>.*)|\s+name\s*=(?P<name>.*))", re.DOTALL)
MAX_NEXT = 100  # characters that Form.next_call may match
LITERALS = {"True": True, "False": False, "None": None}
WRITABLE = r"/[!-;=?-~]([ -;=?-~]{0,62}[!-;=?-~])?/"  # parameter names of the model's choice


@dataclass(frozen=True)
class Form:
    """How a family writes these calls. tag: of the marks around a call. space: what stands around a value."""

    tag: str
    space: str

    @property
    def marks(self) -> tuple[str, str]:
        """The marks before and after a call."""
        return f"<{self.tag}>", f"</{self.tag}>"

    @property
    def ends(self) -> tuple[str, ...]:
        """The marks that end a value that is JSON, except inside of a string."""
        return END, FUNCTION_END, self.marks[1], f"<{PARAMETER}"

    @property
    def next_call(self) -> re.Pattern[str]:
        """Matches the beginning of a call at the end of a text, from the end of the call before it."""
        return re.compile(rf"{FUNCTION_END}\s*</{self.tag}>\s*<{self.tag}>\s*<{FUNCTION}\Z")


QWEN, SEED = Form("tool_call", "\n"), Form("seed:tool_call", "")


def reader(form: Form):
    """The function that makes the reader of one call after its mark."""

    def read(calls):
        if (yield from after_space()) != "<":
            raise NotACall
        yield from expect(FUNCTION)
        name = (yield from name_until(">")).strip()
        if not name:
            raise NotACall
        calls.begin(name)
        calls.add("{")
        try:
            yield from _parameters(calls, form, calls.remembered(name, lambda: _kinds_by_key(calls.tools, name)))
        except CallEnd:
            calls.add("}")
            raise
        calls.add("}")

    return read


def _kinds_by_key(tools, name):
    """The function from a parameter's name to the alternatives of its values, for a tool; any text if it is unknown."""
    tool = next((tool for tool in tools if tool.name == name), None)
    try:
        tool_shapes = shapes(tool.arguments) if tool else []
    except ValueError:
        tool_shapes = []
    return lambda key: kinds(tool_shapes, key, tool.parameters if tool else {})


def _parameters(calls, form, kinds_of):
    """Reads parameters up to </function>. Unknown tags, and text between tags, are dropped."""
    separator, tag = "", ""
    while True:
        tag = tag or (yield from _tag(""))
        if tag == "/function":
            return
        if f"<{tag}>" in form.marks:
            raise CallEnd(f"<{tag}>")
        if tag.startswith(FUNCTION):
            raise CallEnd(f"{form.marks[0]}<{tag}>")
        named, tag = PARAMETER_TAG.fullmatch(tag), ""
        if named:
            key = named["key"].strip() if named["key"] is not None else named["name"].strip(" \t\r\n\"'")
            calls.add(f"{separator}{json.dumps(key)}: ")
            separator = ", "
            tag = yield from _value(calls, form, kinds_of(key))


def _tag(begun):
    """The text between the brackets of the next tag. begun: the part that has been read; empty: not even `<`."""
    if not begun:
        yield from until(("<",), ignore)
    text = begun
    while (character := (yield)) != ">":
        if character == "<" and not text.startswith(PARAMETER):
            text = ""
        elif len(text) < MAX_NAME + len(PARAMETER):
            text += character
    return text.strip()


def _value(calls, form, kinds):
    """Reads a value up to and with its end; returns the tag if another one than </parameter> ended it, or empty."""
    pieces = []
    if is_text(kinds) and not any(map(is_null, kinds)):
        calls.add('"')
        try:
            yield from _text(form, lambda text: calls.add(json.dumps(text)[1:-1]))
        finally:
            calls.add('"')
        return ""
    is_cut, end = True, ""
    try:
        end = yield from (_text(form, pieces.append) if is_text(kinds) else _json(form, pieces))
        is_cut = False
    finally:
        calls.add(json.dumps(_decoded("".join(pieces), kinds, is_cut)))
    return (yield from _tag(PARAMETER)) if end == f"<{PARAMETER}" else end[1:-1] if end else ""


def _json(form, pieces):
    """Reads a value that should be JSON, up to and with its end outside of strings; returns the end if it is another
    one than </parameter>, or empty."""
    num_quotes = 0
    while True:
        first = len(pieces)
        end = yield from until(form.ends, pieces.append)
        part = "".join(pieces[first:])
        num_quotes += re.findall(r'\\.|"', part, re.DOTALL).count('"')
        if num_quotes % 2 == 0 or part.endswith("\n") or (first == 0 and not _is_begun(part)):
            break
        pieces += end
    pieces[:] = "".join(pieces).removeprefix("\n").removesuffix("\n")
    return "" if end == END else end


def _text(form, out):
    """Reads a text up to and with </parameter>. `out` is called with its characters as they are read."""
    text = _Text(Lines(out).add if form.space else out, form.next_call)
    try:
        yield from until((END,), text.add)
    except CallEnd:
        text.end()
        raise
    text.release()


class _Text:
    """A text value that may have </function> in it, or end there, if the model has left out </parameter>.

    So the text from </function> on is held back until </parameter>, the next call or the end of the answer decides.
    """

    def __init__(self, out, next_call) -> None:
        self._out, self._next_call, self._held, self._waiting = out, next_call, "", []

    def add(self, character) -> None:
        """Takes the next character. CallEnd where the next call begins."""
        if self._waiting:
            self._waiting.append(character)
            if character == "=" and (found := self._next_call.search("".join(self._waiting[-MAX_NEXT:]))):
                self._end_at(len(self._waiting) - len(found[0]))
            return
        self._held += character
        if self._held == FUNCTION_END:
            self._waiting, self._held = list(FUNCTION_END), ""
        while self._held and not FUNCTION_END.startswith(self._held):
            self._out(self._held[0])
            self._held = self._held[1:]

    def release(self) -> None:
        """</parameter> was read: the text that is held back belongs to the value."""
        for character in self._waiting or self._held:
            self._out(character)

    def end(self) -> None:
        """The answer has ended. CallEnd, with the text after </function>, if that ended the value."""
        if self._waiting:
            self._end_at("".join(self._waiting).rindex(FUNCTION_END))

    def _end_at(self, at):
        rest = "".join(self._waiting[at + len(FUNCTION_END) :])
        del self._waiting[at:]
        self.release()
        raise CallEnd(rest)


def _is_begun(text):
    """Whether a text is the beginning of an object, array or string, without its end."""
    return text.lstrip().startswith(("{", "[", '"')) and not repaired(text)


class Lines:
    """Passes characters on, without the line break after <parameter=key> and the one before </parameter>."""

    def __init__(self, out) -> None:
        self._out, self._held, self._first = out, "", True

    def add(self, character) -> None:
        """Takes the next character."""
        if self._held:
            self._out(self._held)
        self._held = character if character == "\n" and not self._first else ""
        if character != "\n":
            self._out(character)
        self._first = False


def _decoded(text, kinds, is_cut):
    """The value of a parameter's text: the text itself for a string, None for null, otherwise decoded JSON, or the
    text where it cannot be decoded."""
    if is_text(kinds) and text.strip() not in NOTHING:
        return text
    return LITERALS.get(text.strip(), json_value(text, text, is_cut))


def is_writable(key):
    """Whether `read` can read a parameter of this name."""
    return key == key.strip() and 0 < len(key) <= MAX_NAME and ">" not in key and key.isprintable()


def rules(form: Form):
    """The function that adds rules `call`, for the text after the mark of one call, and `calls`, for a whole answer of
    calls. Parameters come in the schema's order."""

    def add(lark, tools, parallel) -> None:
        options = [_function(lark, form, f"tool_{i}", tool) for i, tool in enumerate(tools)]
        marked_calls(lark, options, parallel, form.marks)

    return add


def _function(lark, form, name, tool):
    with errors_about_parameters(tool):
        parameters = _Parameters(lark, form, name, tool).any
        return lark.rule(name, quote(f"<function={tool.name}>\n"), parameters, quote("</function>"))


class _Parameters(Members):
    """Adds rules for the parameters of one tool. any: the expression for all of its parameters."""

    def __init__(self, lark, form, name, tool) -> None:
        super().__init__(lark, name, tool, WRITABLE)
        self._space, self._end = form.space, f"{form.space}{END}\n"
        self._shapes = shapes(tool.arguments)
        self.any = either([self.members(shape) for shape in self._shapes])

    def is_writable(self, key) -> bool:
        return is_writable(key)

    def known(self, key, schema, shape) -> str:
        if not is_writable(key):
            raise ValueError(f"properties: {key!r:.100} cannot be written in this model's calls")
        return self._parameter(
            quote(f"<{PARAMETER}{key}>{self._space}"), kinds(self._shapes, key, self.tool.parameters), schema
        )

    def unknown(self, key, schema, shape) -> str:
        of_any = kinds(self._shapes, None, self.tool.parameters)
        return self._parameter(f"{quote(f'<{PARAMETER}')} {key} {quote(f'>{self._space}')}", of_any, schema)

    def names(self, shape) -> Iterable[str]:
        return (name for each in self._shapes for name in each.members)

    def _parameter(self, head, written, schema) -> str:
        """Adds a rule for one parameter; returns its name. written: the alternatives that decide how the value is
        written."""
        name, tool = self.new_name(), self.tool
        if not is_text(written):
            whole = schema if isinstance(schema, dict) else {}
            value = self.lark.json(f"{name}_value", self_contained(whole, tool.parameters), tool.strict)
            return self.lark.rule(name, head, value, quote(self._end))
        own = alternatives(schema, tool.parameters)
        texts = [text_rule(self.lark, self.new_name(), kind, tool.strict, END, self._end) for kind in own]
        if not texts:
            raise ValueError("enum: no value fits the schema")
        return self.lark.rule(name, head, either(texts))
