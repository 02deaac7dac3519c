"""Translates GBNF, llama.cpp's notation of grammars, to Lark (see structured.py).

GBNF has no lexer that takes the longest match: its rules match characters. So a grammar without recursion becomes one
Lark terminal, and in a recursive one every terminal is a single character. Otherwise the two notations correspond.
Source: grammars/README.md of llama.cpp.
"""

import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

MAX_GBNF_BYTES = 32 << 10
TOKEN = re.compile(
    r"""(?P<blank>\s+|\#[^\n]*)|(?P<rule>[\w-]+(?=\s*::=))|(?P<equals>::=)|(?P<name>[\w-]+)
    |"(?P<literal>(?:[^"\\]|\\.)*)"|\[(?P<set>(?:[^]\\]|\\.)*)\]|(?P<any>\.)
    |(?P<repeat>[*+?]|\{\s*\d+\s*(?:,\s*(?:\d+\s*)?)?\})|(?P<mark>[|()])""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
CHARACTER = re.compile(
    r"""\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})
    |\\([nrt\\"\[\]])|([^\\])""",
    re.VERBOSE | re.DOTALL,
)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def is_gbnf(text: str) -> bool:
    """Whether a grammar is written in GBNF rather than in Lark: its rules are `name ::= ...`."""
    return re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE) is not None


def to_lark(text: str) -> str:
    """A GBNF grammar, whose rule `root` is the answer, as Lark. ValueError with the line of a mistake."""
    if len(text.encode()) > MAX_GBNF_BYTES:
        raise ValueError(f"GBNF grammar: at most {MAX_GBNF_BYTES} bytes are allowed")
    tokens = list(_tokens(text))
    rules = [value for kind, value, _ in tokens if kind == "rule"]
    is_regular = not _is_recursive(tokens)
    names = {name: f"RULE{i}" if is_regular else f"rule{i}" for i, name in enumerate(dict.fromkeys(rules))}
    if "root" not in names:
        raise ValueError("GBNF grammar: expected a rule root, got none")
    repeated = next((name for name in names if rules.count(name) > 1), None) if len(names) < len(rules) else None
    if repeated is not None:
        raise ValueError(f"GBNF grammar: rule {repeated} is given more than once")
    pieces, depth, before = [], 0, ""
    for kind, value, at in [*tokens, ("rule", "", len(text))]:
        is_end = kind == "rule" or (value in ("|", ")") and kind == "mark")
        if is_end and before in ("equals", "|", "("):
            pieces.append('""')
        depth += (value == "(") - (value == ")") if kind == "mark" else 0
        _check(kind, before, depth, text, at)
        pieces.append(_to_lark(kind, value, names, text, at))
        before = value if kind == "mark" else kind
    return f"start: {names['root']}{''.join(pieces)}"


def _is_recursive(tokens: list[tuple[str, str, int]]) -> bool:
    """Whether a rule contains itself, directly or through other rules."""
    inside: dict[str, set[str]] = {}
    rule = ""
    for kind, value, _ in tokens:
        if kind == "rule":
            rule = value
        elif kind == "name":
            inside.setdefault(rule, set()).add(value)
    try:
        TopologicalSorter(inside).prepare()
    except CycleError:
        return True
    return False


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, text, offset) of each token of a grammar, without white space and comments."""
    at = 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise _wrong(text, at, "text that is no part of GBNF here")
        kind = found.lastgroup or ""  # never empty: every alternative of TOKEN is a named group
        if kind != "blank":
            yield kind, found[kind], at
        at = found.end()


def _check(kind: str, before: str, depth: int, text: str, at: int) -> None:
    """ValueError for a token that cannot follow the one before it. depth: of brackets, after the token."""
    if depth < 0 or (kind == "rule" and depth):
        raise _wrong(text, at, "brackets that do not match")
    if (kind == "equals") != (before == "rule") or (kind != "rule" and not before):
        raise _wrong(text, at, "no rule")
    if kind == "repeat" and before in ("equals", "|", "("):
        raise _wrong(text, at, "a repetition of nothing")


def _to_lark(kind: str, value: str, names: dict[str, str], text: str, at: int) -> str:
    """One token of GBNF in Lark. names: {rule in GBNF: rule in Lark}."""
    if kind == "rule":
        return f"\n{names[value]}" if value else "\n"
    if kind == "equals":
        return ":"
    if kind == "name":
        if value not in names:
            raise _wrong(text, at, f"rule {value}, which is nowhere given")
        return f" {names[value]}"
    if kind == "literal":
        return f" ({' '.join(f'/{_escaped(each)}/' for each in _characters(value, text, at)) or chr(34) * 2})"
    if kind == "set":
        return f" /{_set(value, text, at)}/"
    if kind == "any":
        return " /(?s:.)/"
    return re.sub(r"\s", "", value) if kind == "repeat" else f" {value}"


def _characters(value: str, text: str, at: int) -> list[str]:
    """The characters of a literal or of a set, with escapes decoded."""
    characters, offset = [], 0
    while offset < len(value):
        found = CHARACTER.match(value, offset)
        number = found and (found[1] or found[2] or found[3])
        if found is None or (number and (int(number, 16) > 0x10FFFF or 0xD800 <= int(number, 16) < 0xE000)):
            raise _wrong(text, at, "an escape that is none")
        characters.append(chr(int(number, 16)) if number else ESCAPES.get(found[4], found[4]) or found[5])
        offset = found.end()
    return characters


def _set(value: str, text: str, at: int) -> str:
    """A set of characters as a regular expression."""
    negated = value.startswith("^")
    characters = _characters(value[negated:], text, at)
    if not characters:
        raise _wrong(text, at, "a set without characters")
    inner, i = "", 0
    while i < len(characters):
        is_range = i + 2 < len(characters) and characters[i + 1] == "-"
        if is_range and characters[i] > characters[i + 2]:
            raise _wrong(text, at, "a range that ends before it begins")
        inner += _escaped(characters[i]) + (f"-{_escaped(characters[i + 2])}" if is_range else "")
        i += 3 if is_range else 1
    return f"[{'^' * negated}{inner}]"


def _escaped(character: str) -> str:
    is_plain = character.isascii() and character.isalnum()
    return character if is_plain else f"\\x{{{ord(character):x}}}"


def _wrong(text: str, at: int, what: str) -> ValueError:
    line = text.count("\n", 0, at) + 1
    return ValueError(f"GBNF grammar: line {line} has {what}: {text[at : at + 40]!r}")
