"""Grammars that hold a model to calls of the tools that there are, with arguments that their schemas allow."""

from collections.abc import Sequence

from lockstep.text.grammars.structured import MAX_GRAMMAR_BYTES, dump, quote, with_options
from lockstep.text.tool_calls.tools import Tool

MAX_CALLS = 16


class Lark:
    """The rules of a Lark grammar while it is written.

    special: {text: id} of the tokens that stand for no text; a grammar names those by their id.
    """

    def __init__(self, special) -> None:
        self._special, self._lines, self._size = special, [], 0

    def rule(self, name, *parts, options: str = ""):
        """Adds a rule; returns its name. ValueError where the grammar becomes too large."""
        line = f"{name}{options}: {' '.join(part for part in parts if part)}"
        self._size += len(line)
        if self._size > MAX_GRAMMAR_BYTES:
            raise ValueError(f"tools: their grammar has more than {MAX_GRAMMAR_BYTES} characters")
        self._lines.append(line)
        return name

    def mark(self, text):
        """A text that may be a special token."""
        return f"<[{self._special[text]}]>" if text in self._special else quote(text)

    def json(self, name, schema, strict):
        """A rule for JSON that a schema allows."""
        return self.rule(name, "%json " + dump(with_options(schema, strict)))

    def text_until(self, name, end):
        """A rule for any text up to and with its first `end`."""
        if end in self._special:
            return self.rule(name, r"/(?s:.*)/", self.mark(end))
        return self.rule(name, rf"/(?s:.*){regex_quote(end)}/", options="[lazy]")

    @property
    def text(self) -> str:
        """The grammar."""
        return "\n".join(self._lines)


def regex_quote(text) -> str:
    """A text as it stands in a regular expression of a Lark grammar."""
    return "".join(c if c.isalnum() or c in "_ <>=" else "\\n" if c == "\n" else "\\" + c for c in text)


def either(options) -> str:
    """One of several parts of a rule."""
    return f"({' | '.join(options)})"


def json_objects(lark: Lark, tools: Sequence[Tool], keys: tuple[str, str], more: str = "") -> list[str]:
    """Rules for {"name": ..., "arguments": {...}} of each tool. keys: what these are called; more: what may follow."""
    made = []
    for i, tool in enumerate(tools):
        arguments = lark.json(f"tool_{i}_arguments", tool.arguments, tool.strict)
        head = f'{{"{keys[0]}": {quote(tool.name)}, "{keys[1]}": '
        made.append(lark.rule(f"tool_{i}", quote(head), arguments, more, quote("}")))
    return made


def marked_calls(lark: Lark, options: Sequence[str], parallel: bool) -> None:
    """Rules `call` and `calls` for calls that stand between <tool_call> and </tool_call>, each one of the options."""
    lark.rule("call", quote("\n"), either(options), quote("\n"), lark.mark("</tool_call>"))
    marked = lark.rule("marked", lark.mark("<tool_call>"), "call")
    lark.rule("calls", several(marked, quote("\n"), parallel))


def several(call, separator, parallel):
    """One call, or more with something between them (a weak model would never stop, so their number is bounded)."""
    return f"{call} ({separator} {call}){{0,{MAX_CALLS - 1}}}" if parallel else call
