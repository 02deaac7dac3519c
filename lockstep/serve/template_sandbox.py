"""jinja2's immutable sandbox, bounded: no template can hang the process or fill its memory.

Every loop and macro body starts with a step that is counted and timed; operators, calls and filters that can
make a long string from a short one are checked before they run.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps

from jinja2 import Environment, TemplateError, Undefined, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
MAX_SECONDS = 5.0
MAX_ITEMS = 1_000_000
MAX_CHARS = 1 << 24
MAX_NUMBER = 1 << 20
# A width or precision that large in a format string would allocate as much.
WIDE_FORMAT = re.compile(r"[0-9]{6}|\*")
WIDENING_FILTERS = {"center", "indent", "wordwrap", "batch", "slice", "truncate"}


class GenerationBlock(Extension):
    """{% generation %}, which marks an assistant's words for training: here its body as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between {% generation %} and {% endgeneration %}."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, with its budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = [LoopControlExtension, GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=text_of)
        self._steps = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        self.filters = {name: _bounded_filter(name, filter) for name, filter in self.filters.items()}
        self.filters["tojson"] = to_json
        del self.globals["lipsum"]
        self.globals |= {"range": self._range, "raise_exception": raise_exception, "strftime_now": strftime_now}

    def step(self) -> None:
        """Count one turn of a loop or one call of a macro. Raises SecurityError when there were too many."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds")

    def tilde(self, *parts: object) -> str:
        """The ~ operator. Raises SecurityError if the result would be too long."""
        return self.concat(map(text_of, parts))

    def concat(self, pieces: Iterable[str]) -> str:
        """Pieces of output as one string. Raises SecurityError as soon as they are too long."""
        kept, length = [], 0
        for piece in pieces:
            length += len(piece)
            _check_length(length)
            kept.append(piece)
        return "".join(kept)

    def call(self, context: Context, function: Callable, /, *args: object, **kwargs: object) -> object:
        """Every call in a template."""
        # jinja2 wraps str.format; the method itself is under the wrapper.
        receiver = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(receiver, (str, bytes, int)):
            _check_numbers((*args, *kwargs.values()))
        if isinstance(receiver, str):
            _check_text_result(function.__name__, receiver, args)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """The operators + * ** and %."""
        if operator == "**":
            raise SecurityError("the ** operator is not allowed")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        if operator == "*":
            _check_repetition(left, right)
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        """Refuse at once what the sandbox hides; jinja2 alone would wait until it is used."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > MAX_STEPS:
            raise SecurityError(f"range of {len(numbers)}, at most {MAX_STEPS} steps are allowed")
        return numbers


def text_of(value: object) -> str:
    """str(value). Raises SecurityError for containers that would make a very long text of few objects."""
    if not isinstance(value, str):
        check_size(value)
    return value if isinstance(value, str) else str(value)


def check_size(value: object) -> None:
    """Raise SecurityError if a container holds too much, counting what it holds repeatedly as often."""
    left, budget = [value], MAX_ITEMS
    while left:
        item = left.pop()
        budget -= 1 + (len(item) // 16 if isinstance(item, (str, bytes)) else 0)
        if budget < 0:
            raise SecurityError(f"a value of more than {MAX_ITEMS} items")
        if isinstance(item, Mapping):
            left.extend(item.values())
        elif isinstance(item, (list, tuple)):
            left.extend(item)


def _bounded_filter(name: str, filter: Callable) -> Callable:
    @wraps(filter)
    def bounded(*args: object, **kwargs: object) -> object:
        given = [arg for arg in args if not isinstance(arg, (Context, Environment, nodes.EvalContext))]
        _check_filter(name, given[0] if given else None, (*given[1:], *kwargs.values()))
        return filter(*args, **kwargs)

    return bounded


def _check_filter(name: str, value: object, args: tuple[object, ...]) -> None:
    if name in WIDENING_FILTERS:
        _check_numbers(args)
    if name in ("string", "join", "urlencode", "pprint", "escape", "e", "replace"):
        check_size(value)
    if isinstance(value, str) and name != "join":
        _check_text_result(name, value, args)
    if name == "join" and args and hasattr(value, "__len__"):
        _check_length(len(value) * len(str(args[0])))


def _check_text_result(name: str, text: str, args: tuple[object, ...]) -> None:
    if name in ("format", "format_map"):
        _check_format(text)
    if name == "replace" and len(args) > 1 and isinstance(args[0], str):
        _check_length(len(text) + text.count(args[0]) * len(str(args[1])))
    if name == "join" and args and hasattr(args[0], "__len__"):
        _check_length(len(text) * len(args[0]))
    if name == "indent" and args:
        _check_length(len(text) + text.count("\n") * _width(args[0]))


def _check_repetition(left: object, right: object) -> None:
    for sized, times in ((left, right), (right, left)):
        if hasattr(sized, "__len__") and isinstance(times, int):
            _check_length(len(sized) * times)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
        raise SecurityError("a number of more than 4096 bits")


def _check_format(text: str) -> None:
    if WIDE_FORMAT.search(text):
        raise SecurityError("a width that large in a format string is not allowed")


def _check_numbers(values: Iterable[object]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in values):
        raise SecurityError(f"a width above {MAX_NUMBER} is not allowed")


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"more than {MAX_CHARS} characters")


class _Bounder(NodeTransformer):
    """Put a step at the start of every loop and macro body, and make ~ a checked call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        return self._with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _environment_call("tilde", node.nodes)

    def _with_step(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_environment_call("step", [])))
        return node


def bound_loops(template: nodes.Template) -> nodes.Template:
    """The parsed template with its loops, macros and ~ operators bounded."""
    bounded = _Bounder().visit(template)
    bounded.set_environment(template.environment)
    for node in bounded.find_all(nodes.Node):
        node.lineno = node.lineno or 1
    return bounded


def raise_exception(message: object) -> None:
    """Lets a template refuse a conversation."""
    raise TemplateError(str(message))


def strftime_now(format: str) -> str:
    """The local time, formatted."""
    _check_format(format)
    return datetime.now().strftime(format)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    if indent is not None and _width(indent) > 64:
        raise SecurityError(f"an indent of {indent} is not allowed")
    check_size(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment_call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


def _width(value: object) -> int:
    return value if isinstance(value, int) else len(str(value))
