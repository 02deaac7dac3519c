"""Random schemas, expressions and grammars for answers, most of which are wrong, large or slow."""

import json
import random
from collections.abc import Callable, Sequence

from tests.fuzz.bodies import ODD, SCHEMA, damaged_bytes, damaged_value
from tests.fuzz.client import ask
from tests.fuzz.sockets import head
from tests.serve.chatting import HELLO
from tests.serve.routes.test_chat_refusals import BOMBS

NUMBERS = [0, 1, 2, 7, 99, 9973, 999983, 10**9, -(1 << 63), 1 << 63, 0.1, 1e-9, 1e300, -1, 2.5]
WORDS = ["a", "x" * 50, "", "\u00e9", "$ref", "^", "0", "\U0001f642", "\\", '"', "\n", "#"]
PATTERNS = ["a", "b", ".", r"\d", r"\w", r"\p{L}", r"\s", "[^a-z]", "[a-c]", "(?:x|y)", "(?i)ab", r"\u00e9", "()"]
ODD_PATTERNS = ["^a", "a$", "(?=a)", r"\b", "[", "(", r"\1", "a{9,1}"]
REPEATS = ["", "*", "+", "?", "{3}", "{1,500}", "{0,}", "{1000}", "*?"]
KEYWORDS = """properties required additionalProperties items prefixItems minItems maxItems enum const anyOf allOf oneOf
    minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf $ref $defs
    patternProperties minProperties maxProperties examples title""".split()
ODD_KEYWORDS = """type not if then else definitions $id $anchor uniqueItems contains propertyNames dependentRequired
    unevaluatedProperties default description x-guidance""".split()
TYPES = ["object", "array", "string", "integer", "number", "boolean", "null", ["string", "null"]]
FORMATS = ["date", "date-time", "time", "email", "uuid", "ipv4", "uri", "duration", "nothing"]
LARK = ['"a"', "/a+/", "/[^\\n]*/", "a", "b", "B", '%json {"type": "integer"}', "<|im_end|>", "<[5]>", '"x"i', "start"]
GBNF = ['"a"', "[a-z]", "[^\\n]", "root", "a", ".", '"\\x41"', "[\\u00e9]"]


def schema(rng: random.Random, depth: int = 0) -> object:
    """A random JSON schema, mostly of keywords that constrain a value."""
    if depth > 4 or rng.random() < 0.03:
        return rng.choice([True, False, {}, dict(type="string"), rng.choice(ODD)])
    inner = lambda: schema(rng, depth + rng.choice([1, 1, 2, 4]))
    made: dict[str, object] = {"type": rng.choice(TYPES)} if rng.random() < 0.6 else {}
    for _ in range(rng.randrange(4)):
        word = rng.choice(KEYWORDS if rng.random() < 0.9 else ODD_KEYWORDS)
        made[word] = keyword(rng, word, inner, 200 if depth == 0 else 3)
    return made


def keyword(rng: random.Random, word: str, inner: Callable[[], object], most: int) -> object:
    """A random value of a keyword, with at most `most` parts."""
    if word in ("properties", "$defs", "definitions", "patternProperties"):
        return {rng.choice(WORDS) + str(i % 9): inner() for i in range(rng.choice([1, 3, 3, most]))}
    if word in ("anyOf", "allOf", "oneOf", "prefixItems"):
        return [inner() for _ in range(rng.choice([1, 2, 3, most // 10 or 3]))]
    if word in ("enum", "examples", "required"):
        return rng.choices([*WORDS, *NUMBERS, None, [], {}], k=rng.choice([1, 3, 10 * most]))
    if word in ("$ref", "$id", "$anchor"):
        return rng.choice(["#", "#/$defs/a", "#/properties/a", "http://a/b", "a", "#a", "file:///etc/passwd"])
    if word.startswith(("min", "max", "exclusive", "multiple")):
        return rng.choice(NUMBERS)
    if word == "type":
        return rng.choice(TYPES)
    if word == "pattern":
        return regex(rng)
    if word == "format":
        return rng.choice(FORMATS)
    return inner() if rng.random() < 0.7 else rng.choice(ODD)


def regex(rng: random.Random, depth: int = 0) -> str:
    """A random regular expression."""
    if depth > 3 or rng.random() < 0.3:
        return rng.choice(PATTERNS if rng.random() < 0.98 else ODD_PATTERNS) + rng.choice(REPEATS)
    parts = [regex(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
    return f"({rng.choice(['', '|']).join(parts)}){rng.choice(REPEATS)}"


def rules(rng: random.Random, first: str, mark: str, atoms: list[str], joints: Sequence[str] = (" ", " | ")) -> str:
    """A random grammar of a few rules. first: the name of its first rule."""
    names = [first, "a", "b", "B"][: rng.choice([1, 3, 4, 4])]

    def side(depth: int = 0) -> str:
        many = [rng.choice(atoms) if depth > 2 or rng.random() < 0.7 else f"({side(depth + 1)})" for _ in range(3)]
        joined = rng.choice(joints).join(many[: rng.randrange(1, 4)])
        return joined + rng.choice(["", "", "*", "+", "?", "{1,9}", "{100000}"])

    return "\n".join(f"{name}{mark} {side()}" for name in names)


def lark(rng: random.Random) -> str:
    """A random grammar in Lark's syntax, as llguidance reads it."""
    ends = ["", "\n%ignore /\\s+/", "\n%import common.INT", "\n?a: b"]
    return rules(rng, "start", ":", LARK, (" ", " | ", " | ", " & ")) + rng.choice(ends)


def gbnf(rng: random.Random) -> str:
    """A random grammar in llama.cpp's syntax."""
    return rules(rng, "root", " ::=", GBNF)


def choices(rng: random.Random) -> list[object]:
    """Random texts to choose from."""
    odd = [rng.choice(ODD)] if rng.random() < 0.1 else []
    return odd + [rng.choice([*WORDS, "x" * 3000]) + str(i % 50) for i in range(rng.choice([1, 3, 300, 3000]))]


def tools(rng: random.Random) -> dict[str, object]:
    """Fields with tools of random schemas, one of which must be called."""
    many = [
        dict(type="function", function=dict(name=f"f{i}", parameters=parameters(rng), strict=rng.random() < 0.5))
        for i in range(rng.choice([1, 2, 20]))
    ]
    return dict(tools=many, tool_choice=rng.choice(["auto", "required"]))


def parameters(rng: random.Random) -> object:
    """A random schema of a tool's parameters, mostly an object."""
    made = schema(rng)
    return dict(made, type="object") if isinstance(made, dict) and rng.random() < 0.95 else made


def named(rng: random.Random) -> dict[str, object]:
    """A random schema with the name that OpenAI's API adds."""
    asked = dict(name="x", schema=schema(rng), strict=rng.random() < 0.5)
    return dict(response_format=dict(type="json_schema", json_schema=asked))


FORMS: dict[str, Callable[[random.Random], dict[str, object]]] = dict(
    guided_json=lambda rng: dict(guided_json=schema(rng)),
    json_schema=lambda rng: dict(json_schema=damaged_value(rng, SCHEMA)),
    response_format=named,
    tools=tools,
    regex=lambda rng: dict(guided_regex=regex(rng)),
    lark=lambda rng: dict(guided_grammar=lark(rng)),
    damaged_lark=lambda rng: dict(guided_grammar=damaged_bytes(rng, lark(rng).encode()).decode("utf-8", "replace")),
    gbnf=lambda rng: dict(grammar=gbnf(rng)),
    choice=lambda rng: dict(guided_choice=choices(rng)),
    bomb=lambda rng: rng.choice(list(BOMBS.values())),
    damaged_bomb=lambda rng: damaged_value(rng, rng.choice(list(BOMBS.values()))),
)


class Grammars:
    """The fuzz of grammars. port: of the server."""

    def __init__(self, port: int):
        self._port = port

    def play(self, rng: random.Random) -> str:
        """Sends a request with a random grammar; returns the field and the outcome. Raises Fault."""
        form = rng.choice(list(FORMS))
        asked = FORMS[form](rng)
        asked = asked if isinstance(asked, dict) else dict(guided_json=asked)
        if "tools" in asked or rng.random() < 0.5:
            path, asked = "/v1/chat/completions", dict(messages=HELLO, max_tokens=6) | asked
        else:
            path, asked = "/v1/completions", dict(prompt="x", max_tokens=6) | asked
        asked |= dict(temperature=1, seed=rng.randrange(99), stream=rng.random() < 0.3)
        raw = json.dumps(asked).encode()
        whole = head(b"Content-Length: %d" % len(raw), first=b"POST %s HTTP/1.1" % path.encode()) + raw
        return f"{form} {ask(self._port, whole)}"

    def close(self) -> None:
        """Does nothing: there is nothing to close."""
