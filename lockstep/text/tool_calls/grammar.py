"""Grammars that hold a model to calls of the given tools, with arguments that the tools' schemas allow."""

from collections.abc import Sequence

from lockstep.text.grammars.structured import MAX_GRAMMAR_BYTES, dump, quote, with_options
from lockstep.text.tool_calls.tools import Tool

MAX_CALLS = 16  # in one answer: a weak model may never stop calling


class Lark:
    """A builder of a Lark grammar, rule by rule.

    special: {text: id} of the special tokens, which a grammar names by their ids.
    """

    def __init__(self, special) -> None:
        self._special, self._lines, self._size = special, [], 0

    def rule(self, name, *parts, options: str = ""):
        """Adds a rule whose parts follow each other; returns its name. ValueError if the grammar becomes too large."""
        line = f"{name}{options}: {' '.join(part for part in parts if part)}"
        self._size += len(line)
        if self._size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"tools: their grammar has more than {MAX_GRAMMAR_BYTES} characters")
        self._lines.append(line)
        return name

    def is_token(self, text) -> bool:
        """Whether a text is a special token."""
        return text in self._special

    def mark(self, text):
        """The expression for a text that may be a special token."""
        return f"<[{self._special[text]}]>" if text in self._special else quote(text)

    def json(self, name, schema, strict):
        """Adds a rule for the JSON that a schema allows; returns its name. strict: see structured.json_schema."""
        return self.rule(name, "%json " + dump(with_options(schema, strict)))

    def text_until(self, name, end):
        """Adds a rule for any text up to the first `end`, which belongs to it; returns its name."""
        if end in self._special:
            return self.rule(name, r"/(?s:.*)/", self.mark(end))
        return self.rule(name, rf"/(?s:.*){regex_quote(end)}/", options="[lazy]")

    @property
    def text(self) -> str:
        """The text of the grammar."""
        return "\n".join(self._lines)


def regex_quote(text) -> str:
    """The text, escaped for a regular expression in a Lark grammar."""
    return "".join(c if c.isalnum() or c in "_ <>=" else "\\n" if c == "\n" else "\\" + c for c in text)


def either(options) -> str:
    """The expression for one of several alternatives."""
    return f"({' | '.join(options)})"


def json_objects(lark: Lark, tools: Sequence[Tool], keys: tuple[str, str], more: str = "") -> list[str]:
    """Adds a rule for the object {"name": ..., "arguments": {...}} of each tool; returns their names.

    keys: the names of the two members. more: an expression for further members.
    """
    names = []
    for i, tool in enumerate(tools):
        arguments = lark.json(f"tool_{i}_arguments", tool.arguments, tool.strict)
        head = f'{{"{keys[0]}": {quote(tool.name)}, "{keys[1]}": '
        names.append(lark.rule(f"tool_{i}", quote(head), arguments, more, quote("}")))
    return names


def marked_calls(lark: Lark, options: Sequence[str], parallel: bool, marks: tuple[str, str]) -> None:
    """Adds rules `call` and `calls` for calls between two marks. options: alternatives of a call."""
    lark.rule("call", quote("\n"), either(options), quote("\n"), lark.mark(marks[1]))
    marked = lark.rule("marked", lark.mark(marks[0]), "call")
    lark.rule("calls", several(marked, quote("\n"), parallel))


def several(call, separator, parallel):
    """The expression for one call or, if parallel, up to MAX_CALLS with a separator between them."""
    return f"{call} ({separator} {call}){{0,{MAX_CALLS - 1}}}" if parallel else call
