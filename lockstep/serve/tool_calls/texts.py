"""Arguments that stand in a call as plain text, without quotes: which are strings, and what a schema allows of them."""
import re

import llguidance

from lockstep.serve.structured import quote
from lockstep.serve.tool_calls.grammar import regex_quote

MAX_STEPS = 1000  # of a schema's references and alternatives
MAX_LENGTH = 20_000  # what is longer cannot be counted by an automaton of a sensible size
ASCII = {"d": "0-9", "w": "A-Za-z0-9_"}  # what a schema's patterns mean by them; ours would know all alphabets
WRITTEN = {"/": r"\/", "\n": r"\n", "\r": r"\r"}  # what would end a regular expression in a grammar
DAY = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
ZONE = r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {"date": f"^{DAY}$", "time": f"^{CLOCK}{ZONE}$", "date-time": f"^{DAY}T{CLOCK}{ZONE}$",
           "uuid": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$", "ipv4": r"^([0-9]{1,3}\.){3}[0-9]{1,3}$",
           "email": r"^[^\s@]+@[^\s@]+\.[^\s@]+$", "uri": r"^[A-Za-z][A-Za-z0-9+.-]*:[^\s]*$"}


def alternatives(schema, root):
    """The schemas of which a value has to fit one, without anyOf, lists of types, enum or references to root."""
    made, left = [], [schema]
    for _ in range(MAX_STEPS):
        if not left:
            return made
        each = left.pop()
        parts = _parts(each, root)
        made += [each] if parts is None else []
        left += reversed(parts or [])
    return [{"type": "object"}]


def _parts(schema, root):
    """The alternatives that a schema is made of; None if it is one itself."""
    if not isinstance(schema, dict) or not schema:
        return [{"type": "string"}]
    if "$ref" in schema:
        return [_resolved(schema["$ref"], root)]
    if isinstance(schema.get("enum"), list):
        return [{"const": value} for value in schema["enum"]]
    if isinstance(schema.get("type"), list):
        return [schema | {"type": kind} for kind in schema["type"]]
    several = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(several, list):
        return several
    whole = schema.get("allOf")
    return whole if isinstance(whole, list) and len(whole) == 1 else None


def _resolved(reference, root):
    found = root
    for step in str(reference).removeprefix("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, dict) else None
    return found if isinstance(found, dict) and found is not root else {"type": "object"}


def is_string(alternative):
    """Whether an alternative allows strings only."""
    if "const" in alternative:
        return isinstance(alternative["const"], str)
    return alternative.get("type") == "string"


def is_null(alternative):
    """Whether an alternative allows nothing but null."""
    return alternative.get("const", 0) is None or alternative.get("type") == "null"


def text_rule(lark, name, schema, strict, end):
    """A rule for the text of what an alternative allows, a string or null, and what ends it: a line break and a mark.

    strict: what cannot be enforced is a ValueError; otherwise it is not.
    """
    if "const" in schema or is_null(schema):
        return lark.rule(name, quote((schema.get("const") or "" if is_string(schema) else "null") + end))
    parts = [*_length(schema), *_patterns(schema, strict)] or [rf"~/(?s:.*){regex_quote(end.strip())}(?s:.*)/"]
    value = lark.rule(f"{name}_text".upper(), " & ".join([*parts, "/(?s:.*)/"]))
    return lark.rule(name, value, quote(end), options="[lazy]")


def _length(schema):
    least, most = schema.get("minLength"), schema.get("maxLength")
    counts = [str(n) if type(n) is int and 0 <= n <= MAX_LENGTH else "" for n in (least, most)]
    return [f"/(?s:.){{{counts[0] or 0},{counts[1]}}}/"] if any(counts) else []


def _patterns(schema, strict):
    made, known = [], schema.get("format")
    if strict and known is not None and known not in tuple(FORMATS):
        raise ValueError(f"format: {known!r:.80} cannot be enforced, only {', '.join(FORMATS)}")
    for pattern in (schema.get("pattern"), FORMATS.get(known) if isinstance(known, str) else None):
        if isinstance(pattern, str):
            made += _pattern(pattern, strict)
    return made


def _pattern(pattern, strict):
    whole = searched(pattern)
    problem = llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_regex(whole))
    if problem and strict:
        raise ValueError(f"pattern: {pattern!r:.200} cannot be enforced: {problem.splitlines()[0][:200]}")
    return [] if problem else [f"/{whole}/"]


def searched(pattern):
    """A regular expression that may match anywhere in a text, as one that matches the whole text."""
    made, depth, in_class = [""], 0, False
    for piece in re.findall(r"\\.|[^\\]|\\$", pattern, re.DOTALL):
        depth += (not in_class) * ((piece == "(") - (piece == ")"))
        if piece == "|" and not depth and not in_class:
            made.append("")
            continue
        in_class = piece == "[" or in_class and piece != "]"
        made[-1] += _ascii(piece, in_class)
    return "|".join(map(_anchored, made))


def _ascii(piece, in_class):
    characters = ASCII.get(piece[1:]) if piece.startswith("\\") else None
    if characters is not None:
        return characters if in_class else f"[{characters}]"
    return WRITTEN.get(piece[-1], piece)


def _anchored(pattern):
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", pattern) is not None
    inner = pattern[begins:len(pattern) - ends]
    return ("" if begins else "(?s:.*)") + f"(?:{inner})" + ("" if ends else "(?s:.*)")
