"""The sorts of objects that a JSON schema allows, with anyOf, allOf and references resolved.

For the styles of calls that write each argument on its own, where a grammar needs a rule for each member.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

from lockstep.text.grammars.schemas import target
from lockstep.text.tool_calls.texts import alternatives, both, matches

MAX_SHAPES = 64
MAX_STEPS = 20_000  # schemas and members that are visited for one schema
MAX_NAMES = 16  # members with names of the model's choice in one object: a weak model may never stop
IGNORED = frozenset(
    """not if then else propertyNames dependentRequired dependentSchemas dependencies
    unevaluatedProperties""".split()
)


@dataclass(frozen=True)
class Shape:
    """One sort of object that a schema allows: a schema without anyOf, oneOf, allOf and references.

    known: {name: schema} of `properties`. listed: whether the schema has `properties` at all. required: names of
    members. patterns: {pattern: schema} of `patternProperties`. others: `additionalProperties`: a schema, False, or
    None if not given. min_members, max_members: `minProperties`, `maxProperties`.
    """

    known: dict[str, object] = field(default_factory=dict)
    listed: bool = False
    required: frozenset[str] = frozenset()
    patterns: dict[str, object] = field(default_factory=dict)
    others: Any = None
    min_members: int = 0
    max_members: int | None = None

    def of(self, name: str) -> object:
        """The schema of the member of this name; False if the member is not allowed."""
        schemas = [schema for pattern, schema in self.patterns.items() if matches(pattern, name)]
        schemas += [self.known[name]] if name in self.known else []
        schemas = schemas or [True if self.others is None else self.others]
        for schema in schemas[1:]:
            schemas[0] = both(schemas[0], schema)
        return schemas[0]

    @cached_property
    def members(self) -> dict[str, object]:
        """{name: schema} of all members whose names the schema gives: those in `known`, then further required ones."""
        names = dict.fromkeys([*self.known, *sorted(self.required)])
        return {name: self.of(name) for name in names}

    @cached_property
    def unknown(self) -> dict[str | None, object]:
        """{pattern: schema} of members whose names the model chooses; the key None stands for names without a pattern.

        A schema with `properties` but without `additionalProperties` gets no such members, unless minProperties needs
        them.
        """
        needs = (not self.listed and not self.patterns) or self.min_members > len(self.members)
        others = self.others if self.others is not None else needs
        return {**self.patterns, **({} if others is False else {None: others})}


def shapes(schema: dict, root: dict | None = None) -> list[Shape]:
    """The Shapes of the objects that a schema allows. Its references lead into `root`, or else into the schema itself.

    ValueError if it allows no object, or more than MAX_SHAPES sorts.
    """
    made = _Search(root or schema).shapes(schema, ())
    possible = [shape for shape in made if all(shape.members[name] is not False for name in shape.required)]
    if not possible:
        raise ValueError("no object fits the schema")
    return possible


def kinds(found: list[Shape], name: str | None, root: dict) -> list[dict]:
    """The alternatives (see texts.alternatives) of the values of one member in any of these Shapes, which decide how a
    value is written. name: None: of the members whose names the model chooses. root: the schema for references."""
    known = [shape.members[name] for shape in found if name in shape.members]
    unknown = [] if known else [schema for shape in found for schema in shape.unknown.values()]
    return [kind for schema in known or unknown or [True] for kind in alternatives(schema, root)]


class _Search:
    """Finds the Shapes of a schema, in a bounded number of steps."""

    def __init__(self, root) -> None:
        self._root, self._steps_left = root, MAX_STEPS

    def shapes(self, schema, path) -> list[Shape]:
        """The Shapes of one schema. path: id()s of the schemas around it; a schema inside of itself adds no limits."""
        self._step(1)
        if schema is False:
            return []
        if not isinstance(schema, dict) or id(schema) in path:
            return [Shape()]
        made = list(_own(schema))
        for choices in self._choices(schema):
            others = [shape for choice in choices for shape in self.shapes(choice, (*path, id(schema)))]
            if len(made) * len(others) > MAX_SHAPES:
                raise ValueError(f"anyOf: at most {MAX_SHAPES} kinds of objects can be told apart")
            made = [self._merged(one, other) for one, other in product(made, others)]
        return made

    def _step(self, num_steps) -> None:
        self._steps_left -= num_steps
        if self._steps_left < 0:
            raise ValueError(f"its parts are more than the {MAX_STEPS} that can be put together")

    def _choices(self, schema) -> Iterator[list]:
        """Yields lists of schemas: an object must fit one schema of each list."""
        if "$ref" in schema:
            yield [target(schema["$ref"], self._root)]
        yield from (schema[word] for word in ("anyOf", "oneOf") if isinstance(schema.get(word), list))
        whole = schema.get("allOf")
        yield from ([part] for part in (whole if isinstance(whole, list) else ()))

    def _merged(self, one, other):
        self._step(len(one.known) + len(other.known))
        return merged(one, other)


def _own(schema) -> Iterator[Shape]:
    """The Shapes that a schema's own keywords allow, without its references, anyOf, oneOf and allOf."""
    types = schema.get("type", "object")
    if "object" not in (types if isinstance(types, list) else [types]):
        return
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    shape = _described(schema)
    if not isinstance(values, list):
        yield shape
        return
    for value in values:
        if isinstance(value, dict):
            exact: dict[str, object] = {name: {"const": each} for name, each in value.items()}
            yield merged(Shape(exact, True, frozenset(exact), others=False), shape)


def _described(schema) -> Shape:
    known, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(known, dict) or not isinstance(required, list) or not all(isinstance(n, str) for n in required):
        raise ValueError("expected an object of properties and a list of required")
    patterns = schema.get("patternProperties") or {}
    least, most = (schema.get(word) for word in ("minProperties", "maxProperties"))
    patterns = dict(patterns) if isinstance(patterns, dict) else {}
    return Shape(
        dict(known),
        "properties" in schema,
        frozenset(required),
        patterns,
        schema.get("additionalProperties"),
        least if _is_count(least) else 0,
        most if _is_count(most) else None,
    )


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def merged(one: Shape, other: Shape) -> Shape:
    """The Shape of the objects that fit both Shapes."""
    if other == Shape():
        return one
    required = one.required | other.required
    known = {name: both(one.of(name), other.of(name)) for name in dict.fromkeys([*one.known, *other.known])}
    patterns = {
        pattern: both(one.patterns.get(pattern, True), other.patterns.get(pattern, True))
        for pattern in dict.fromkeys([*one.patterns, *other.patterns])
    }
    said = [each for each in (one.others, other.others) if each is not None]
    limits = [each for each in (one.max_members, other.max_members) if each is not None]
    others = both(*said) if len(said) == 2 else said[0] if said else None
    return Shape(
        known,
        one.listed or other.listed,
        required,
        patterns,
        others,
        max(one.min_members, other.min_members),
        min(limits, default=None),
    )
