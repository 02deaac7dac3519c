"""Arguments that a call has as plain text, without quotes: which of them are strings, and rules for their schemas."""

import json
import re

import llguidance

from lockstep.text.grammars.matchers import check, new_matcher, readable
from lockstep.text.grammars.schemas import MAX_PATTERN_BYTES, NOTES, resolved
from lockstep.text.grammars.structured import quote
from lockstep.text.tool_calls.grammar import regex_quote

MAX_STEPS = 1000  # of a schema's references and alternatives
MAX_LENGTH = 20_000  # a larger minLength or maxLength would need an automaton that is too large
ASCII = {"d": "0-9", "w": "A-Za-z0-9_"}  # JSON schema's meaning of \d and \w; llguidance's has all alphabets
WRITTEN = {"/": r"\/", "\n": r"\n", "\r": r"\r"}  # characters that would end a regular expression in a grammar
DAY = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
ZONE = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {
    "date": f"^{DAY}$",
    "time": f"^{CLOCK}{ZONE}$",
    "date-time": f"^{DAY}T{CLOCK}{ZONE}$",
    "uuid": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "ipv4": r"^([0-9]{1,3}\.){3}[0-9]{1,3}$",
    "email": r"^[^\s@]+@[^\s@]+\.[^\s@]+$",
    "uri": r"^[A-Za-z][A-Za-z0-9+.-]*:[^\s]*$",
}
TEXT_KEYWORDS = NOTES | frozenset("type const minLength maxLength pattern format".split())
OBJECT, STRING, ANY = {"type": "object"}, {"type": "string"}, {}
END = "</parameter>"  # the mark after a value


def alternatives(schema: object, root: dict) -> list[dict]:
    """The simple schemas that a schema is the union of, without anyOf, lists of types, enum and references to root. A
    schema that allows any value is one of a string."""
    return [STRING if kind == ANY else kind for kind in union(schema, root, OBJECT)]


def union(schema: object, root: dict, whole: dict) -> list[dict]:
    """As `alternatives`, but ANY stays. whole: what stands for a reference to root itself."""
    simple, left = [], [schema]
    for _ in range(MAX_STEPS):
        if not left:
            return [kind for kind in simple if _is_possible(kind)]
        each = left.pop()
        parts = _parts(each, root, whole)
        simple += [each] if parts is None else parts if parts == [ANY] else []
        left += reversed(parts if parts and parts != [ANY] else [])
    return [OBJECT]


def _parts(schema, root, whole):
    """The schemas that a schema is the union of, one level down; None if it is an alternative itself."""
    if schema is False:
        return []
    if not isinstance(schema, dict) or not schema.keys() - NOTES:
        return [ANY]
    if "$ref" in schema:
        return [both(_target(schema["$ref"], root, whole), _without(schema, "$ref"))]
    if isinstance(schema.get("enum"), list):
        return [both({"const": value}, _without(schema, "enum")) for value in schema["enum"]]
    if isinstance(schema.get("type"), list):
        return [schema | {"type": kind} for kind in schema["type"]]
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return [both(part, _without(schema, word)) for part in schema[word]]
    whole = schema.get("allOf")
    return [both(whole[0], _without(schema, "allOf"))] if isinstance(whole, list) and len(whole) == 1 else None


def _without(schema, word):
    return {keyword: value for keyword, value in schema.items() if keyword != word and keyword not in NOTES}


def both(one: object, other: object) -> object:
    """The schema of the values that fit both schemas."""
    if one is False or other is False:
        return False
    if not isinstance(one, dict) or not isinstance(other, dict) or one == other:
        return one if isinstance(one, dict) else other
    shared = [word for word in one.keys() & other.keys() - NOTES if one[word] != other[word]]
    return {**other, **one} if not shared else {"allOf": [one, other]}


def _target(reference, root, whole):
    schema = resolved(reference, root)
    return whole if schema is root else schema if isinstance(schema, (dict, bool)) else OBJECT


def is_string(alternative: dict) -> bool:
    """Whether an alternative allows strings only."""
    if "const" in alternative:
        return isinstance(alternative["const"], str)
    return alternative.get("type") == "string"


def is_null(alternative: dict) -> bool:
    """Whether an alternative allows nothing but null."""
    return alternative.get("const", 0) is None or alternative.get("type") == "null"


def is_text(kinds: list[dict]) -> bool:
    """Whether a value of these alternatives is written as plain text: all are strings (or null), at least one is a
    string, and no constant has the end mark in it."""
    return (
        any(map(is_string, kinds))
        and all(is_string(kind) or is_null(kind) for kind in kinds)
        and not any(END in kind["const"] for kind in kinds if isinstance(kind.get("const"), str))
    )


def _is_possible(alternative):
    """False for a constant that is not of the type given beside it."""
    kind = alternative.get("type")
    if "const" not in alternative or kind not in ("string", "null"):
        return True
    return is_string(alternative) if kind == "string" else alternative["const"] is None


def text_rule(lark, name, schema, strict, mark, end):
    """Adds a rule for the text of a value that an alternative (a string or null) allows, with its end; returns its
    name.

    mark: a text that the value does not have in it. end: what stands after the value: the mark, and the white space
    around it. strict: a keyword that cannot be enforced is a ValueError; otherwise it is ignored.
    """
    if strict and schema.keys() - TEXT_KEYWORDS:
        raise ValueError(f"{min(schema.keys() - TEXT_KEYWORDS)}: cannot be enforced for a string")
    if "const" in schema or is_null(schema):
        return lark.rule(name, quote((schema.get("const") or "" if is_string(schema) else "null") + end))
    patterns, free = _patterns(schema, strict), f"/{without(mark)}/"
    parts = [*_length(schema), *patterns]
    if patterns and not _fits_a_text([*parts, free]):
        if strict:
            raise ValueError(f"no text that can stand in this model's calls fits {json.dumps(schema)[:200]}")
        parts = []
    value = lark.rule(f"{name}_text".upper(), " & ".join([*parts, free]))
    return lark.rule(name, value, lark.mark(end), options="" if lark.is_token(end) else "[lazy]")


def without(mark: str) -> str:
    """A regular expression for all texts without the mark, whose first character must occur only once in it.

    It uses no negation: to find that the intersection of a negation with a bound on the text's length is empty takes
    llguidance more work than one mask may take.
    """
    first, rest = regex_quote(mark[0]), ""
    for character in map(regex_quote, reversed(mark[1:])):
        rest = f"([^{first}{character}][^{first}]*{f'|{character}{rest}' if rest else ''})?"
    return f"[^{first}]*({first}{rest})*"


def _fits_a_text(parts) -> bool:
    """Whether any text matches all of these terminals."""
    grammar = json.dumps({"grammars": [{"lark_grammar": f"start: TEXT\nTEXT: {' & '.join(parts)}"}]})
    try:
        matcher = new_matcher(llguidance.LLTokenizer("byte"), grammar)
        matcher.compute_bitmask()  # only computing a mask finds an empty language
        check(matcher)
    except ValueError:
        return False
    return True


def _length(schema):
    least, most = schema.get("minLength"), schema.get("maxLength")
    counts = [str(n) if type(n) is int and 0 <= n <= MAX_LENGTH else "" for n in (least, most)]
    return [f"/(?s:.){{{counts[0] or 0},{counts[1]}}}/"] if any(counts) else []


def _patterns(schema, strict):
    terminals, known = [], schema.get("format")
    if strict and known is not None and known not in tuple(FORMATS):
        raise ValueError(f"format: {known!r:.80} cannot be enforced, only {', '.join(FORMATS)}")
    for pattern in (schema.get("pattern"), FORMATS.get(known) if isinstance(known, str) else None):
        if isinstance(pattern, str):
            terminals += pattern_part(pattern, strict)
    return terminals


def pattern_part(pattern: str, strict: bool) -> list[str]:
    """The terminal, in a list, for texts in which a schema's pattern is found; empty if it cannot be enforced, which is
    a ValueError if strict."""
    whole = searched(pattern)
    problem = f"more than {MAX_PATTERN_BYTES} characters" if len(whole) > MAX_PATTERN_BYTES else problem_with(whole)
    if problem and strict:
        raise ValueError(f"pattern: {pattern!r:.200} cannot be enforced: {problem.splitlines()[-1][:200]}")
    return [] if problem else [f"/{whole}/"]


def problem_with(regex: str) -> str:
    """The reason why a regular expression cannot be enforced; empty if it can be."""
    return readable(llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_regex(regex)))


def matches(pattern: str, text: str) -> bool:
    """Whether a schema's pattern is found in a text. False for a pattern that cannot be enforced. Linear time."""
    if not pattern_part(pattern, False):
        return False
    grammar = llguidance.LLMatcher.grammar_from_regex(searched(pattern))
    matcher, read = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0), list(text.encode())
    return matcher.try_consume_tokens(read) == len(read) and matcher.is_accepting()


def searched(pattern) -> str:
    """Turns a regular expression that is searched for in a text into one that matches the whole text."""
    parts, depth, in_class = [""], 0, False
    for piece in re.findall(r"\\.|[^\\]|\\$", pattern, re.DOTALL):
        depth += (not in_class) * ((piece == "(") - (piece == ")"))
        if piece == "|" and not depth and not in_class:
            parts.append("")
            continue
        in_class = piece == "[" or (in_class and piece != "]")
        parts[-1] += _ascii(piece, in_class)
    return "|".join(map(_anchored, parts))


def _ascii(piece: str, in_class: bool) -> str:
    characters = ASCII.get(piece[1:]) if piece.startswith("\\") else None
    if characters is not None:
        return characters if in_class else f"[{characters}]"
    return WRITTEN.get(piece[-1], piece)


def _anchored(pattern):
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins : len(pattern) - ends]
    return ("" if begins else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)")
