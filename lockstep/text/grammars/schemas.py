"""Untrusted JSON schemas: walks their subschemas, resolves references, and finds keywords that cannot be enforced."""

import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

import llguidance

MAX_NESTING = 64
MAX_SCHEMA_BYTES = 256 << 10
MAX_PATTERN_BYTES = 32 << 10  # of a regular expression, whose compilation is not linear
LEAST_NUMBER = -(1 << 62)  # for ranges from about -2^63 llguidance fails, or recurs until the process dies
EXACT_NUMBER = 1 << 53  # every range up to 2^53 can be enforced; larger ones are compiled to find out
SMALL_NUMBER = 1e-6  # ranges with smaller bounds are compiled to find out, too
MAX_MULTIPLES = 10_000  # product of a schema's different multipleOf: the automaton has that many states
MAX_REFERENCES = 1000  # different references that a part of a schema may need

NAMED_PARTS = frozenset("properties patternProperties $defs definitions dependentSchemas".split())
LISTED_PARTS = frozenset("allOf anyOf oneOf prefixItems items".split())
SINGLE_PARTS = frozenset(
    """items additionalItems unevaluatedItems contains additionalProperties unevaluatedProperties
    propertyNames not if then else contentSchema""".split()
)
RANGES = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum".split())
COUNTS = frozenset("minProperties maxProperties".split())
PLACES = frozenset("$id id $schema $anchor $defs definitions".split())  # keywords about identity and definitions
# Keywords that say nothing about which values are allowed.
NOTES = frozenset(
    """title description default examples example deprecated readOnly writeOnly $comment $id id $schema
    $anchor $defs definitions contentMediaType contentEncoding nullable""".split()
)


def check_size(value: object, what: str = "JSON schema") -> None:
    """ValueError if objects and lists are nested more than MAX_NESTING deep, or have so many values that their JSON
    text is longer than MAX_SCHEMA_BYTES."""
    level, depth, num_values = [value], 0, 0
    while more := sum(map(len, map(_children, level))):
        depth, num_values = depth + 1, num_values + more
        if depth > MAX_NESTING:
            raise ValueError(f"{what}: nested more than {MAX_NESTING} deep")
        if 2 * num_values > MAX_SCHEMA_BYTES:  # a value has at least one character, and one comma or bracket after it
            raise ValueError(f"{what}: more than {MAX_SCHEMA_BYTES} characters, at most so many are allowed")
        level = [child for each in level for child in _children(each) if isinstance(child, (dict, list))]


def parts_of(schema: object) -> Iterator[object]:
    """The direct subschemas of a schema."""
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        if keyword in NAMED_PARTS and isinstance(value, dict):
            yield from value.values()
        elif keyword in LISTED_PARTS and isinstance(value, list):
            yield from value
        elif keyword in SINGLE_PARTS:
            yield value


def subschemas(root: dict, follows: bool = True) -> Iterator[dict]:
    """The schema itself and every schema inside of it. follows: also the schemas that its references lead to."""
    left: list[object] = [root]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if not isinstance(each, dict) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        left += [*parts_of(each), *([resolved(each["$ref"], root)] if follows and "$ref" in each else [])][::-1]


def rewritten(schema: Any, change: Callable[[dict], dict]) -> Any:
    """The schema with change() applied to every subschema, the inner ones first, and to itself."""
    if not isinstance(schema, dict):
        return schema
    changed = {}
    for keyword, value in schema.items():
        if keyword in NAMED_PARTS and isinstance(value, dict):
            value = {name: rewritten(part, change) for name, part in value.items()}
        elif keyword in LISTED_PARTS and isinstance(value, list):
            value = [rewritten(part, change) for part in value]
        elif keyword in SINGLE_PARTS:
            value = rewritten(value, change)
        changed[keyword] = value
    return change(changed)


# ---------------------------------------------------------------- references


def resolved(reference: object, root: dict) -> object:
    """The value that a reference leads to inside of the schema `root`; None if there is none."""
    if not isinstance(reference, str):
        return None
    own, _, fragment = reference.partition("#")
    if own and own != root.get("$id"):
        return None
    if fragment and not fragment.startswith("/"):
        return next((each for each in subschemas(root, follows=False) if each.get("$anchor") == fragment), None)
    value = root
    for step in unquote(fragment).split("/")[1:]:
        value = _member(value, step.replace("~1", "/").replace("~0", "~"))
    return value


def _member(value, step):
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and step.isascii() and step.isdigit() and len(step) < 8 and int(step) < len(value):
        return value[int(step)]
    return None


def self_contained(schema: dict, root: dict) -> dict:
    """A subschema of `root` as a schema of its own: the schemas that its references lead to become its `$defs`.

    ValueError for references that lead nowhere, or for too many of them.
    """
    names, left = {}, []

    def change(part):
        kept = {keyword: value for keyword, value in part.items() if keyword not in PLACES}
        if "$ref" not in kept:
            return kept
        reference = kept["$ref"]
        if not isinstance(reference, str) or reference not in names:
            left.append(target(reference, root))
            names[reference] = f"d{len(names)}"
        return kept | {"$ref": f"#/$defs/{names[reference]}"}

    own, definitions, size = rewritten(schema, change), {}, 0
    while left:
        definitions[f"d{len(definitions)}"] = rewritten(left.pop(0), change)
        size += len(json.dumps(definitions[f"d{len(definitions) - 1}"]))
        if len(names) > MAX_REFERENCES or size > MAX_SCHEMA_BYTES:
            raise ValueError(
                f"$ref: expected at most {MAX_REFERENCES} different ones, and {MAX_SCHEMA_BYTES} "
                "characters that they lead to"
            )
    return own | ({"$defs": definitions} if definitions else {})


def target(reference: object, root: dict) -> dict | bool:
    """The schema that a reference leads to inside of `root`. ValueError if it leads to no schema."""
    found = resolved(reference, root)
    if not isinstance(found, (dict, bool)):
        raise ValueError(f"$ref: {reference!r:.200} leads to no schema inside of the schema")
    return found


# ---------------------------------------------------------------- what can be enforced


def loosened(schema: dict) -> dict:
    """The schema without the patterns, ranges, multipleOf and counts that cannot be enforced. Bounds of 64-bit integers
    are moved to the nearest ones that can be."""
    multiples = set()

    def change(part):
        kept = {
            keyword: value for keyword, given in part.items() if _is_within(keyword, value := _narrowed(keyword, given))
        }
        if not _has_room(kept.get("multipleOf"), multiples):
            del kept["multipleOf"]
        kept = _with_known_names(kept)
        if kept.keys() & COUNTS and not _compiles(_outline(kept)):
            kept = {keyword: value for keyword, value in kept.items() if keyword not in COUNTS}
        return kept

    return rewritten(schema, change)


def _outline(schema):
    """The schema's limits on names and number of an object's members, without the schemas of the members."""
    named = {
        word: dict.fromkeys(schema[word], True)
        for word in ("properties", "patternProperties")
        if isinstance(schema.get(word), dict)
    }
    others = {word: schema[word] for word in (*COUNTS, "required") if word in schema}
    is_free = schema.get("additionalProperties") is not False
    return {"type": "object", **named, **others, "additionalProperties": is_free}


def exact(schema: dict) -> dict:
    """A schema that can be enforced and allows the same, or a little less.

    llguidance computes ranges in float64, so a bound of an integer beyond 2^53 moves to the next float64 inside of the
    range. ValueError for such a bound of another type than integer, and for a minProperties that the model could
    satisfy by writing the same freely chosen name twice.
    """

    def change(part):
        _check_names(part)
        is_integer = part.get("type") == "integer"
        large = [
            word
            for word in part.keys() & RANGES
            if type(part[word]) in (int, float) and abs(part[word]) > EXACT_NUMBER - is_integer
        ]
        if not large:
            return part
        if not is_integer:
            raise ValueError(f"JSON schema: {min(large)}: beyond 2^53 it can be enforced for type integer only")
        kept = {word: value for word, value in part.items() if word not in large}
        for word in large:
            is_least = "inimum" in word
            bound = _inner_bound(part[word], is_least, word.startswith("exclusive"))
            word, choose = ("minimum", max) if is_least else ("maximum", min)
            kept[word] = choose(kept.get(word, bound), bound)
        return kept

    return rewritten(schema, change)


def _inner_bound(value, is_least, is_exclusive):
    """The integer nearest to a bound that is inside of the range and a float64. is_least: the bound is a minimum."""
    if value in (math.inf, -math.inf):
        return value
    inner = int(value) + is_exclusive * (1 if is_least else -1)
    near = float(inner)
    if near < inner if is_least else near > inner:
        near = math.nextafter(near, math.inf if is_least else -math.inf)
    return int(near)


def _check_names(part) -> None:
    least, required = part.get("minProperties"), part.get("required")
    has_names = part.get("patternProperties") or part.get("additionalProperties", True) is not False
    most = 1 + (len(set(required)) if isinstance(required, list) and all(isinstance(n, str) for n in required) else 0)
    if type(least) is int and least > most and has_names:
        raise ValueError(
            f"JSON schema: minProperties: at most {most} can be enforced where names are not given by the "
            f"schema, one more than are required, got {least}"
        )


def _narrowed(keyword, value):
    if keyword in RANGES and type(value) in (int, float):
        return max(value, LEAST_NUMBER) if "inimum" in keyword else min(value, -LEAST_NUMBER)
    return value


def _is_within(keyword, value):
    if keyword in RANGES and type(value) in (int, float):
        if not LEAST_NUMBER <= value <= -LEAST_NUMBER:
            return False
        exact = abs(value) <= EXACT_NUMBER and (value == 0 or abs(value) >= SMALL_NUMBER)
        return exact or _compiles({"type": "number", keyword: value})
    return keyword != "pattern" or not isinstance(value, str) or _is_pattern(value)


def _is_pattern(pattern):
    return len(pattern) <= MAX_PATTERN_BYTES and _compiles({"type": "string", "pattern": pattern})


def _compiles(schema) -> bool:
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    return not llguidance.LLMatcher.validate_grammar(grammar)


def _with_known_names(schema):
    """The schema without the patternProperties whose patterns cannot be enforced: members with such names are allowed
    as additionalProperties instead."""
    patterns = schema.get("patternProperties")
    if not isinstance(patterns, dict):
        return schema
    kept = {pattern: part for pattern, part in patterns.items() if _is_pattern(pattern)}
    if len(kept) == len(patterns):
        return schema
    others = [part for pattern, part in patterns.items() if pattern not in kept]
    if schema.get("additionalProperties", True) is not False:
        others.append(schema.get("additionalProperties", True))
    free = others[0] if len(others) == 1 else {"anyOf": others}
    return {**schema, "patternProperties": kept, "additionalProperties": free}


def check_numbers(schema: dict) -> None:
    """ValueError for a multipleOf that is not above 0, for multipleOf whose product is so large that compiling would
    take long, or for a number so far below zero that compiling would not end."""
    multiples = set()
    for part in subschemas(schema):
        _check_least([part.get("const"), part.get("enum"), *(part.get(keyword) for keyword in RANGES)])
        if not _has_room(part.get("multipleOf"), multiples):
            raise ValueError(f"JSON schema: multipleOf: at most {MAX_MULTIPLES} can be enforced, as the product of all")


def _has_room(multiple, multiples) -> bool:
    """Whether a multipleOf can be enforced together with the earlier ones, `multiples`, to which it is then added."""
    if type(multiple) not in (int, float):
        return True
    if not 0 < multiple < float("inf"):
        raise ValueError(f"JSON schema: multipleOf: expected a number above 0, got {multiple!r:.40}")
    numerator, product = Fraction(str(multiple)).numerator, 1
    for other in {*multiples, numerator}:
        product *= other
        if product > MAX_MULTIPLES:
            return False
    multiples.add(numerator)
    return True


def _check_least(values) -> None:
    level = values
    while level:
        lowest = min((each for each in level if type(each) in (int, float)), default=0)
        if lowest < LEAST_NUMBER:
            raise ValueError(f"JSON schema: {lowest} is too small a number, expected at least {LEAST_NUMBER}")
        level = [child for each in level for child in _children(each)]


def _children(value):
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
