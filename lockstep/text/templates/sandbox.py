"""jinja2's immutable sandbox with the filters and functions of Hugging Face chat templates.

A template in it reaches no file, module or private attribute. Its time and memory are bounded from outside: see
child.py.
"""

import json
from datetime import datetime
from typing import ClassVar

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlock(Extension):
    """{% generation %}, which marks an assistant's text for training. Here only its body is rendered. A variable that
    is set in it has its old value behind it, as in transformers."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The nodes between {% generation %} and {% endgeneration %}."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment in which templates are compiled and rendered. Nothing in it is random."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, GenerationBlock])
        self.filters = {**self.filters, "tojson": to_json}
        del self.filters["random"], self.globals["lipsum"]
        self.globals |= {"range": range, "raise_exception": raise_exception, "strftime_now": strftime_now}

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        """Raises SecurityError for a forbidden attribute at once; jinja2 itself raises only when its value is used."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not allowed")


def raise_exception(message: object) -> None:
    """Called by a template to refuse a conversation, with the reason."""
    raise TemplateError(str(message))


def strftime_now(format: str) -> str:
    """The local time, formatted."""
    return datetime.now().strftime(format)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
