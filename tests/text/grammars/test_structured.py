"""Constrained decoding: the masks allow exactly the texts of the grammar."""

import json
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.text.grammars import matchers, structured
from lockstep.text.grammars.structured import Grammars
from tests.text.grammar_cases import GRAMMARS, KINDS, PERSON, TOKENIZERS, allowed, allows, random_answer


@pytest.mark.parametrize("kind", ["byte_level", "gguf"])
@pytest.mark.parametrize("grammar, good, bad", [
    (structured.json_schema(PERSON),
     ['{"name": "Bo", "age": 7}', '{\n  "name":"",\n  "age":150}', '{"name":"日本","age":1}'],
     ['{"name": "Bo"}', '{"name": "Bo", "age": 151}', '{"name": "Bobbie", "age": 7}', '[]', '',
      '{"age": 7, "name": "Bo"}',
      '{"name": "Bo", "age": 7, "x": 1}', '{\n\n\n\n"name":"a","age":1}']),
    (structured.json_object(), ['{}', '{"a": [1, {"b": null}]}'], ['[]', '1', '{"a": }', '{"a": 1']),
    (structured.regex(r"[a-c]{2,3}\d?"), ["ab", "abc1"], ["a", "abcd", "ab12", ""]),
    (structured.lark('start: "a" inner "b"\ninner: "(" inner ")" | ""'), ["ab", "a((()))b"], ["a(b", "a)(b", ""]),
    (structured.lark('start: %json {"const": "%json"}'), ['"%json"'], ['"a"']),
    (structured.choice(["yes", "no", "né\n\"🙂"]), ["yes", "no", "né\n\"🙂"], ["y", "yesno", "", "maybe"]),
])  # fmt: skip
def test_what_grammars_allow(kind, grammar, good, bad):
    assert [text for text in good if not allows(kind, grammar, text)] == []
    assert [text for text in bad if allows(kind, grammar, text)] == []


schemas = st.recursive(
    st.sampled_from(
        [
            dict(type="boolean"),
            dict(type="null"),
            dict(type="integer", minimum=-5, maximum=99),
            dict(enum=["a", "b b", 3, None]),
            dict(const="c"),
            dict(type="string", maxLength=4),
            dict(type="string", pattern="^[a-f]{1,3}[0-9]?$"),
            dict(type="number", minimum=0, maximum=2),
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda i, n: dict(type="array", items=i, minItems=n, maxItems=n + 2), inner, st.integers(0, 2)),
        st.builds(lambda a, b: dict(anyOf=[a, b]), inner, inner),
        st.builds(
            lambda p, r: dict(
                type="object", properties=p, required=[k for k in p if k in r], additionalProperties=False
            ),
            st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
            st.sets(st.sampled_from("abcd")),
        ),
    ),
    max_leaves=6,
)


@KINDS
@settings(max_examples=15, deadline=None)
@given(schema=schemas, seed=st.integers(0, 99))
def test_random_answers_validate(kind, schema, seed):
    answer = random_answer(kind, structured.json_schema(schema), np.random.default_rng(seed))
    if answer is not None:
        jsonschema.validate(json.loads(answer), schema)


def test_most_random_answers_end():
    answers = [random_answer("byte_level", structured.json_schema(PERSON), np.random.default_rng(s)) for s in range(8)]
    assert sum(a is not None for a in answers) >= 7


def test_regex_answers_match():
    pattern = r"(\w{1,4}-)?[0-9]{3}(\.[0-9])?"
    for seed in range(10):
        answer = random_answer("sentencepiece", structured.regex(pattern), np.random.default_rng(seed))
        assert re.fullmatch(pattern, answer)


def test_each_sample_has_its_own_state():
    tokenizer, mask = TOKENIZERS["byte_level"], GRAMMARS["byte_level"].mask(structured.choice(["ab", "cd"]))
    a, b, c, d = (tokenizer.encode(letter)[0] for letter in "abcd")
    first, second = [], []
    assert {a, c} <= set(allowed(mask(first)))
    first.append(a)
    assert {a, c} <= set(allowed(mask(second)))
    second.append(c)
    assert list(allowed(mask(first))) == [b] and list(allowed(mask(second))) == [d]
    assert list(allowed(mask([c]))) == [d]
    del first[:]
    assert {a, c} <= set(allowed(mask(first)))


def test_a_trigger_starts_and_ends_the_grammar():
    tokenizer = TOKENIZERS["byte_level"]
    trigger, after = tokenizer.backend.token_to_id("<tool call>"), tokenizer.encode("!")[0]
    one, two = tokenizer.encode("1")[0], tokenizer.encode("2")[0]
    grammar = structured.choice(["12"])
    mask, ids = GRAMMARS["byte_level"].mask(grammar, 1, trigger, after), []
    expected = [
        (trigger, None),
        (after, None),
        (two, None),
        (trigger, [one]),
        (one, [two]),
        (two, None),
        (two, None),
        (trigger, [one]),
    ]
    for token, options in expected:
        ids.append(token)
        words = mask(ids)
        assert (words if words is None else list(allowed(words))) == options


def test_end_tokens_only_where_the_grammar_is_complete():
    tokenizer, mask = TOKENIZERS["byte_level"], GRAMMARS["byte_level"].mask(structured.regex("a+"))
    a = tokenizer.encode("a")[0]
    assert 0 not in allowed(mask([]))
    assert {0, a} <= set(allowed(mask([a])))
    done = GRAMMARS["byte_level"].mask(structured.choice(["a"]))
    assert list(allowed(done([a]))) == [0] and list(allowed(done([a, 0]))) == [0]


def test_a_token_that_was_not_allowed_is_an_error():
    mask = GRAMMARS["byte_level"].mask(structured.choice(["a"]))
    with pytest.raises(ValueError, match="grammar"):
        mask([TOKENIZERS["byte_level"].encode("b")[0]])


def nested(levels):
    schema = dict(type="string")
    for _ in range(levels):
        schema = dict(type="array", items=schema)
    return schema


@pytest.mark.parametrize("make, message", [
    (lambda: structured.json_schema(nested(40000)), "nested more than 64"),
    (lambda: structured.json_schema(dict(enum=["x" * 99] * 9999)), "at most 262144"),
    (lambda: structured.json_schema([]), "expected an object"),
    (lambda: structured.json_schema(dict(type="nonsense")), "nonsense"),
    (lambda: structured.json_schema(dict(pattern="\ud800")), "."),
    (lambda: structured.json_schema(dict(type="array", uniqueItems=True)), "uniqueItems"),
    (lambda: structured.json_schema({"$ref": "http://127.0.0.1/schema"}), "127.0.0.1"),
    (lambda: structured.json_schema({"$ref": "file:///etc/passwd"}), "etc/passwd"),
    (lambda: structured.json_schema(dict(type="string", pattern="(")), "regex"),
    (lambda: structured.regex("a(?=b)"), "look"),
    (lambda: structured.regex("[ab"), "unclosed"),
    (lambda: structured.regex("\ud800"), "surrogate"),
    (lambda: structured.regex(3), "expected a text"),
    (lambda: structured.regex("(" * 5000 + ")" * 5000), "."),
    (lambda: structured.lark("start: missing"), "missing"),
    (lambda: structured.lark("start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
    (lambda: structured.lark("x" * 300_000), "at most 32768"),
    (lambda: structured.lark("start: %json nothing"), "expected JSON after %json"),
    (lambda: structured.lark("start: %json " + "[" * 30_000), "expected JSON after %json"),
    (lambda: structured.json_schema(dict(type="integer", multipleOf=0)), "multipleOf: expected a number above 0"),
    (lambda: structured.json_schema(dict(type="integer", multipleOf=-3), strict=False), "a number above 0, got -3"),
    (lambda: structured.choice([]), "choice"),
    (lambda: structured.choice(["a", 1]), "choice"),
])  # fmt: skip
def test_mistakes_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        GRAMMARS["byte_level"].mask(make())([])


LOOSE = [
    (dict(type="string", pattern="^(?!x)[a-z]+$"), ['"xa"'], ["1"]),
    (
        dict(
            type="object",
            properties=dict(a=dict(type="string", pattern=r"\bx"), b=dict(type="string", pattern="^y$")),
            required=["a", "b"],
        ),
        ['{"a": "z", "b": "y"}'],
        ['{"a": 1, "b": "y"}', '{"a": "x", "b": "z"}'],
    ),
    (
        dict(
            type="object",
            patternProperties={"(?=a)": dict(type="integer"), "^b": dict(type="null")},
            additionalProperties=False,
        ),
        ['{"c": 1}', '{"b": null}', "{}"],
        ['{"c": "d"}', '{"b": 1}'],
    ),
    (
        dict(type="object", patternProperties={"(?=a)": dict(type="integer")}, additionalProperties=dict(type="null")),
        ['{"c": 1}', '{"c": null}'],
        ['{"c": "d"}'],
    ),
    (dict(type="integer", minimum=-(1 << 63), maximum=(1 << 63) - 1), ["-5", str(1 << 62)], ["1.5", "9" * 19]),
    (dict(type="integer", minimum=-(1 << 63), maximum=9), ["-5"], ["10"]),
    (dict(type="number", exclusiveMaximum=1e19, minimum=1e-300), ["0.5"], ['"a"', "1e30"]),
    (dict(type="integer", minimum=-1e300, exclusiveMaximum=-1e19), ["3"], ['"a"']),
    (dict(type="integer", multipleOf=99999989), ["7"], ["0.5"]),
    (
        dict(items=dict(type="integer", multipleOf=99), prefixItems=[dict(type="integer", multipleOf=9999)]),
        ["[7, 198]"],
        ["[7, 199]"],
    ),
    (dict(type="object", properties=dict(a={}), minProperties=2, maxProperties=2), ['{"a": 1, "b": 2}'], ["[]"]),
    (dict(type="integer", multipleOf=3, examples=[dict(multipleOf=0), dict(multipleOf=99999989)]), ["9"], ["7"]),
]


@pytest.mark.parametrize("schema, good, bad", LOOSE, ids=range(len(LOOSE)))
def test_what_cannot_be_enforced_is_ignored_unless_strict(schema, good, bad):
    grammar = structured.json_schema(schema, strict=False)
    assert [text for text in good + bad if allows("byte_level", grammar, text)] == good
    if "examples" not in schema:
        with pytest.raises(ValueError):
            GRAMMARS["byte_level"].mask(structured.json_schema(schema, strict=True))


@pytest.mark.parametrize("make, shown, hidden", [
    (lambda: structured.regex("(?=a)b"), "look-ahead", "start:"),
    (lambda: structured.json_schema(dict(type="string", pattern="(")), "unclosed group", "%json"),
    (lambda: structured.compose('start: "a" nowhere'), "unknown name", "at 1("),
    (lambda: structured.lark('start: "a" nowhere'), 'at 1(8): unknown name: "nowhere"', ".rs"),
])  # fmt: skip
def test_places_in_a_grammar_are_told_to_those_who_wrote_it(make, shown, hidden):
    with pytest.raises(ValueError) as caught:
        GRAMMARS["byte_level"].mask(make())
    assert shown in str(caught.value) and hidden not in str(caught.value)


def test_places_in_a_librarys_source_are_told_to_nobody():
    for message in ("panic: index out of bounds at parser/src/earley/lexer.rs:44:9 <backtrace>", "a b.rs:3: c"):
        assert ".rs" not in matchers.readable(message, shows_lines=True)
    assert matchers.readable("a src/b.rs:3: c") == "a  c"


def test_a_model_without_end_token_is_refused():
    tokenizer = TOKENIZERS["byte_level"]
    with pytest.raises(ValueError, match="no end token"):
        Grammars(tokenizer, (), tokenizer.vocab_size).mask(structured.json_object())
