"""Rules for the values that a JSON schema allows, in the notation of Gemma's calls (gemma.py)."""

import json
import re

from lockstep.text.grammars.schemas import NOTES, self_contained, target
from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import Lark, either
from lockstep.text.tool_calls.members import Members
from lockstep.text.tool_calls.shapes import Shape, shapes
from lockstep.text.tool_calls.texts import MAX_LENGTH, TEXT_KEYWORDS, text_rule, union
from lockstep.text.tool_calls.tools import Tool

BARE = re.compile(r"[A-Za-z0-9_$@.-]{1,64}")  # names of members that are written without delimiters
WRITABLE = "/[A-Za-z_][A-Za-z0-9_-]{0,63}/"  # of the model's choice
SCALARS = frozenset(["integer", "number", "boolean", "null"])  # are written as in JSON
TYPES = ("string", "number", "boolean", "null", "array", "object")
KEYWORDS = TEXT_KEYWORDS | frozenset(
    """minimum maximum exclusiveMinimum exclusiveMaximum multipleOf items prefixItems minItems maxItems properties
    required additionalProperties patternProperties minProperties maxProperties allOf""".split()
)  # that are enforced
MAX_VALUES = 5000  # different schemas of values in one tool


def notation(value: object, delimiter: str) -> str:
    """A value in Gemma's notation."""
    if isinstance(value, str):
        return f"{delimiter}{value}{delimiter}"
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{_name(key, delimiter)}:{notation(each, delimiter)}" for key, each in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(notation(each, delimiter) for each in value) + "]"
    return json.dumps(value)


def _name(key: str, delimiter: str) -> str:
    return key if BARE.fullmatch(key) else f"{delimiter}{key}{delimiter}"


class Values(Members):
    """Adds rules for the values in one tool's arguments."""

    def __init__(self, lark: Lark, name: str, tool: Tool, delimiter: str) -> None:
        super().__init__(lark, name, tool, WRITABLE, separator=",")
        self._delimiter, self._root, self._known = delimiter, tool.arguments, {}

    def arguments(self) -> str:
        """The expression for the arguments."""
        return self._object(self._root)

    def is_writable(self, key: str) -> bool:
        return self._delimiter not in key

    def known(self, key: str, schema: object, shape: Shape) -> str:
        if not self.is_writable(key):
            raise ValueError(f"properties: {key!r:.100} cannot be written in this model's calls")
        return f"{self._literal(f'{_name(key, self._delimiter)}:')} {self._value(schema)}"

    def unknown(self, key: str, schema: object, shape: Shape) -> str:
        return f"{key} {quote(':')} {self._value(schema)}"

    def _value(self, schema: object) -> str:
        """The rule for the values of a schema, which is made once, so that a schema may contain itself."""
        key = json.dumps(schema, sort_keys=True)
        if key not in self._known:
            if len(self._known) == MAX_VALUES:
                raise ValueError(f"expected at most {MAX_VALUES} different schemas of values")
            name = self._known[key] = self.new_name()
            self._check_reference(schema)
            options = [option for kind in union(schema, self._root, self._root) for option in self._options(kind)]
            if not options:
                raise ValueError(f"no value fits the schema {key[:200]}")
            self.lark.rule(name, either(options))
        return self._known[key]

    def _check_reference(self, schema) -> None:
        if isinstance(schema, dict) and "$ref" in schema:
            target(schema["$ref"], self._root)

    def _options(self, kind: dict) -> list[str]:
        """Expressions for the values of a simple schema."""
        if self.tool.strict and kind.keys() - KEYWORDS - NOTES:
            raise ValueError(f"{min(kind.keys() - KEYWORDS - NOTES)}: cannot be enforced in this model's calls")
        types = _types(kind)
        if "const" in kind:
            is_possible = _type(kind["const"]) & types and not _has(kind["const"], self._delimiter)
            return [self._literal(notation(kind["const"], self._delimiter))] if is_possible else []
        if types <= SCALARS:
            return [self._scalar(kind)] if types else []
        if "allOf" in kind and types != {"object"}:
            raise ValueError("allOf: cannot be enforced in this model's calls")
        made = {"string": self._string, "array": self._array, "object": self._object}
        return [made.get(each, self._scalar)(kind | {"type": each}) for each in TYPES if each in types]

    def _literal(self, text: str) -> str:
        """The expression for exactly this text, whose delimiters may be tokens."""
        first, *others = text.split(self._delimiter)
        parts = [first] + [part for other in others for part in (None, other)]
        return " ".join(
            self.lark.mark(self._delimiter) if part is None else quote(part) for part in parts if part != ""
        )

    def _scalar(self, kind: dict) -> str:
        return self.lark.json(self.new_name(), self_contained(kind, self._root), self.tool.strict)

    def _string(self, kind: dict) -> str:
        own = {word: value for word, value in kind.items() if word in TEXT_KEYWORDS}
        text = text_rule(self.lark, self.new_name(), own, self.tool.strict, self._delimiter, self._delimiter)
        return f"{self.lark.mark(self._delimiter)} {text}"

    def _object(self, kind: dict) -> str:
        made = [self.members(shape) for shape in shapes(kind, self._root)]
        return f"{quote('{')} {either(made)} {quote('}')}"

    def _array(self, kind: dict) -> str:
        first, rest = kind.get("prefixItems", []), kind.get("items", True)
        if not isinstance(first, list) or isinstance(rest, list):
            raise ValueError("items, prefixItems: expected one schema, and a list of schemas")
        least, most = _count(kind.get("minItems")) or 0, _count(kind.get("maxItems"))
        most = len(first) if most is None and rest is False else most
        first = first[:most]
        left = None if most is None else most - len(first)
        item = "" if rest is False or left == 0 else self._value(rest)
        after = _repeated(item, least - len(first), left, len(first) > 0)
        for at, schema in reversed([*enumerate(first)]):
            comma = quote(",") if at else ""
            after = f"({comma} {self._value(schema)} {after}){'?' if at >= least else ''}"
        return f"{quote('[')} {after} {quote(']')}"


def _repeated(item: str, least: int, most: int | None, is_later: bool) -> str:
    """The expression for items with commas between them. is_later: a comma comes before the first."""
    comma, least = quote(","), max(0, least)
    if not item or most == 0:
        if least:
            raise ValueError("minItems: no array fits the schema")
        return ""
    top = "" if most is None else most
    if is_later:
        return f"({comma} {item}){{{least},{top}}}"
    some = f"{item} ({comma} {item}){{{max(0, least - 1)},{top and top - 1}}}"
    return some if least else f"({some})?"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value <= MAX_LENGTH else None


def _types(schema: dict) -> frozenset[str]:
    """The types of the values that a simple schema allows; without "integer" beside "number"."""
    types = _stated_types(schema)
    return types - {"integer"} if "number" in types else types


def _stated_types(schema: object) -> frozenset[str]:
    """The types that a schema and the schemas in its allOf state, all where they state none."""
    known = schema if isinstance(schema, dict) else {}
    stated = known.get("type", TYPES)
    types = frozenset(stated if isinstance(stated, (list, tuple)) else [stated])
    if "number" in types:
        types |= {"integer"}
    for part in known.get("allOf", ()):
        types &= _stated_types(part)
    return types


def _type(value: object) -> frozenset[str]:
    """The types that a value has."""
    if isinstance(value, bool) or value is None:
        return frozenset(["null" if value is None else "boolean"])
    if isinstance(value, (int, float)):
        is_integer = isinstance(value, int) or value.is_integer()
        return frozenset(["number", "integer"] if is_integer else ["number"])
    return frozenset(["string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"])


def _has(value: object, text: str) -> bool:
    """Whether a string in a value has the text in it."""
    if isinstance(value, str):
        return text in value
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_has(part, text) for part in parts)
