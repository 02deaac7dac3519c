"""Rules for objects that a model writes member by member, for the styles of calls whose notation is no JSON."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import Lark, either
from lockstep.text.tool_calls.shapes import IGNORED, MAX_NAMES, Shape
from lockstep.text.tool_calls.texts import pattern_part
from lockstep.text.tool_calls.tools import Tool

MAX_COUNTED = 500  # rules for an object with minProperties or maxProperties
NOTHING = '""'  # the expression for no text


@contextmanager
def errors_about_parameters(tool: Tool) -> Iterator[None]:
    """Makes the messages of ValueErrors inside of the `with` block name the tool."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"tools: parameters of {tool.name}: {error}") from None


class Members(ABC):
    """Adds rules for the members of the objects in one tool's arguments, to a Lark. A subclass writes one member.

    name: which the names of the rules begin with. writable: the regular expression of names that the model may choose.
    separator: the text between two members.
    """

    def __init__(self, lark: Lark, name: str, tool: Tool, writable: str, separator: str = "") -> None:
        if tool.strict and tool.parameters.keys() & IGNORED:
            raise ValueError(f"{min(tool.parameters.keys() & IGNORED)}: cannot be enforced")
        self.lark, self.tool, self._name, self._writable, self._num_names = lark, tool, name, writable, 0
        self._separator = quote(separator) if separator else ""

    @abstractmethod
    def is_writable(self, key: str) -> bool:
        """Whether a member of this name can be written, so that one that is not required is left out if not."""

    @abstractmethod
    def known(self, key: str, schema: object, shape: Shape) -> str:
        """The expression for a member of this name."""

    @abstractmethod
    def unknown(self, key: str, schema: object, shape: Shape) -> str:
        """The expression for a member whose name the model chooses. key: the expression for the name."""

    def names(self, shape: Shape) -> Iterable[str]:
        """Names that the model may not choose, since the schema gives them."""
        return shape.members

    def new_name(self) -> str:
        """A name for a rule."""
        self._num_names += 1
        return f"{self._name}_{self._num_names}"

    def members(self, shape: Shape) -> str:
        """The expression for the members of one Shape, those with names in the schema's order, then others."""
        parts = [
            (self.known(key, schema, shape), key in shape.required)
            for key, schema in shape.members.items()
            if schema is not False and (key in shape.required or self.is_writable(key))
        ]
        others = self._others(shape)
        least, most = max(0, shape.min_members - len(shape.required)), shape.max_members
        is_counted = least > 0 or (most is not None and most < len(parts) + MAX_NAMES * bool(others))
        if is_counted or self._separator:
            return self._in_order(parts, others, shape, is_counted)
        optional = [part if must else f"{part}?" for part, must in parts]
        return " ".join([*optional, *([f"{others}{{0,{MAX_NAMES}}}"] if others else []), NOTHING])

    def _in_order(self, parts: Sequence[tuple[str, bool]], others: str, shape: Shape, is_counted: bool) -> str:
        """The expression for the parts, each with whether it must be there: a rule for the rest after each part and
        each number of members so far, which is 1 for any number of them unless minProperties or maxProperties count."""
        least, most, top = 0, MAX_NAMES + 1, 1
        if is_counted:
            least = shape.min_members
            most = len(parts) + max(MAX_NAMES, least) if shape.max_members is None else shape.max_members
            top = min(most, len(parts))
            if len(parts) * (top + 1) > MAX_COUNTED or least > MAX_COUNTED:
                raise ValueError(f"minProperties, maxProperties: expected at most {MAX_COUNTED} counts of properties")
        after = {count: self._repeated(others, least - count, most - count, count > 0) for count in range(top + 1)}
        for part, must in reversed(parts):
            after = {
                count: self._either(
                    [
                        [self._separator if count else "", part, after.get(count + 1 if is_counted else 1)],
                        *([] if must else [["", "", rest]]),
                    ]
                )
                for count, rest in after.items()
            }
        whole = after[0]
        if whole is None:
            raise ValueError("minProperties, maxProperties: no object fits the schema")
        return whole

    def _repeated(self, part: str, least: int, most: int, is_later: bool) -> str | None:
        """The expression for least to most parts, at most MAX_NAMES unless more are needed; None if that is impossible.
        is_later: a separator comes before the first."""
        if (least > 0 and not part) or most < 0:
            return None
        least, most = max(0, least), min(most, max(least, MAX_NAMES))
        if not part or not most:
            return NOTHING
        if is_later or not self._separator:
            return f"({self._separator} {part}){{{least},{most}}}"
        some = f"{part} ({self._separator} {part}){{{max(0, least - 1)},{most - 1}}}"
        return some if least else f"({some})?"

    def _either(self, options: Sequence[Sequence[str | None]]) -> str | None:
        possible = [" ".join(filter(None, option)) for option in options if option[-1] is not None]
        return self.lark.rule(self.new_name(), " | ".join(possible)) if possible else None

    def _others(self, shape: Shape) -> str:
        """The expression for a member whose name the model chooses; empty if the Shape allows none."""
        strict = self.tool.strict
        given = "".join(f" & ~{quote(key)}" for key in dict.fromkeys(self.names(shape)))
        patterns = [part for pattern in shape.patterns for part in pattern_part(pattern, strict)]
        options = []
        for pattern, schema in shape.unknown.items():
            named = [f"~{part}" for part in patterns] if pattern is None else pattern_part(pattern, strict)
            if schema is False or (pattern is not None and not named):
                continue
            key = self.lark.rule(f"{self.new_name()}_key".upper(), " & ".join([self._writable, *named]) + given)
            options.append(self.unknown(key, schema, shape))
        return either(options) if options else ""
