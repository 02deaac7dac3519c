"""No grammar costs more than a little time or memory, and none ends the process."""

import itertools
import json
import time

import numpy as np
import pytest

from lockstep.text.grammars import matchers, structured
from tests.slowness import is_within
from tests.text.grammar_cases import GRAMMARS, MIN, allowed, allows, random_answer

MULTIPLES = dict(
    schema=lambda many: structured.json_schema(dict(allOf=[dict(multipleOf=each) for each in many])),
    elsewhere=lambda many: structured.json_schema(dict(x=[dict(multipleOf=each) for each in many])),
    lark=lambda many: structured.lark("start: %json " + json.dumps(dict(anyOf=[dict(multipleOf=n) for n in many]))),
)


@pytest.mark.parametrize("where", MULTIPLES)
def test_a_product_of_many_numbers_is_never_computed(where):
    for count in (60, 5000, 100_000):
        numbers, started = [float(f"1.{i:06d}1e300") for i in range(count)], time.process_time()
        try:
            MULTIPLES[where](numbers)
            assert where == "elsewhere" and count < 100_000
        except ValueError as error:
            assert any(why in str(error) for why in ("multipleOf: at most", "at most so many", "at most 32768"))
        assert is_within(time.process_time() - started, 1)


def all_of(levels):
    return dict(type="string") if levels == 0 else dict(allOf=[all_of(levels - 1)] * 2)


def chain(n):
    two = lambda i: [{"$ref": f"#/$defs/d{i}"}, dict(type="array", items={"$ref": f"#/$defs/d{i}"})]
    return {"$ref": "#/$defs/d0", "$defs": {f"d{i}": dict(anyOf=two(i + 1)) for i in range(n)} | {f"d{n}": {}}}


BOMBS = dict(
    all_of=lambda: structured.json_schema(all_of(12)),
    references=lambda: structured.json_schema(chain(40)),
    items=lambda: structured.json_schema(dict(type="array", items={}, minItems=10**9)),
    length=lambda: structured.json_schema(dict(type="string", minLength=10**8, maxLength=10**9)),
    pattern=lambda: structured.json_schema(dict(type="string", pattern="^((a{1,500}){1,500}){1,500}$")),
    multiple=lambda: structured.json_schema(dict(type="integer", multipleOf=999983)),
    multiples=lambda: structured.json_schema(dict(allOf=[dict(type="integer", multipleOf=n) for n in (991, 997)])),
    fraction=lambda: structured.json_schema(dict(type="number", multipleOf=0.999983)),
    in_lark=lambda: structured.lark('start: %json {"properties": {"a": {"multiple\\u004ff": 999983}}}'),
    nine=lambda: structured.json_schema(dict(type="integer", multipleOf=9973)),
    properties=lambda: structured.json_schema(dict(properties={f"p{i}": {} for i in range(5000)})),
    repeats=lambda: structured.regex("((a{1,1000}){1,1000}){1,1000}"),
    backtracking=lambda: structured.regex("(x+x+)+y"),
    states=lambda: structured.regex("(a|b)*a(a|b){900}"),
    letters=lambda: structured.regex(r"(\p{L}{1,100}\p{N}{1,100}){1,100}"),
    ambiguous=lambda: structured.lark('start: a\na: a a | a a a | "x" | ""'),
    intersection=lambda: structured.lark(
        "start: X\nX: " + " & ".join(f"/(?s:.*a.{{{i}}}.*)/" for i in range(1, 20))),
    repeated_rule=lambda: structured.lark('start: ("a" | "b"){1000000000}'),
)  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(name):
    """A grammar is refused or compiled within a bounded time, and so is each mask, whatever the answer."""
    started = time.process_time()
    try:
        random_answer("byte_level", BOMBS[name](), np.random.default_rng(1), most=40)
    except ValueError as error:
        assert len(str(error)) < 1000
    assert is_within(time.process_time() - started, 5)


def test_a_limit_is_reached_by_ones_own_answer_only(monkeypatch):
    """Each of these answers takes many of the automaton's states, and none has fewer because of earlier answers."""
    monkeypatch.setitem(matchers.LIMITS, "max_lexer_states", 300)
    for seed in range(8):
        mask = GRAMMARS["byte_level"].mask(structured.regex("[abcd]*a[abcd]{40}x"), 3)
        for _ in range(4):
            ids, rng = [], np.random.default_rng(seed)
            for _ in range(60):
                ids.append(int(rng.choice(allowed(mask(ids)))))


@pytest.mark.parametrize("strict", [True, False])
def test_a_long_text_may_be_bounded(strict):
    """Each character of a string with a maxLength takes states of the automaton; a page of text has to fit."""
    text = "It was a dark and stormy night. " * 250
    schema = dict(type="string", maxLength=20_000)
    assert len(text) == 8000 and allows("byte_level", structured.json_schema(schema, strict), json.dumps(text))


def linked(link, last, count):
    """A schema with this many definitions, each of which refers to the next."""
    names = [f"d{i}" for i in range(count)]
    links = {name: link({"$ref": f"#/$defs/{after}"}) for name, after in itertools.pairwise(names)}
    return {"$ref": "#/$defs/d0", "$defs": links | {names[-1]: last}}


@pytest.mark.parametrize("link", [lambda to: to, lambda to: dict(items=to), lambda to: dict(anyOf=[to])], ids=range(3))
def test_a_long_chain_of_references_does_not_end_the_process(link):
    schema = linked(link, dict(type="string"), 5000)
    GRAMMARS["byte_level"].mask(structured.json_schema(schema, strict=False))


@pytest.mark.parametrize(
    "schema",
    [
        dict(enum=[MIN]),
        dict(enum=["x", MIN + 1]),
        dict(const=MIN),
        dict(const=dict(a=[1, MIN])),
        dict(type="integer", minimum=MIN, maximum=MIN),
        dict(type="integer", minimum=-1e300, exclusiveMaximum=-1e19),
    ],
    ids=str,
)
def test_numbers_far_below_zero_do_not_end_the_process(schema):
    for make in (
        lambda: structured.json_schema(dict(items=schema)),
        lambda: structured.lark("start: %json " + json.dumps(schema)),
    ):
        with pytest.raises(ValueError, match="too small a number"):
            make()


def test_what_compiles_worse_than_linearly_is_bounded():
    rules = [f"A{i}: (A{i + 1} b)*" for i in range(1000)]
    for make in (
        lambda: structured.lark("\n".join(["start: A0", *rules, "A1000: /a/"])),
        lambda: structured.regex("(a?)" * 10_000),
        lambda: structured.lark(f"start: /{'(a?)' * 10_000}/"),
    ):
        with pytest.raises(ValueError, match=r"at most (1000 rules|32768)"):
            make()
