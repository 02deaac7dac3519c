"""Grammars are enforced exactly: quoted texts of special tokens, numbers beyond 2^53, and where answers end."""

import json
import re

import jsonschema
import numpy as np
import pytest

from lockstep.text.grammars import structured
from lockstep.text.grammars.gbnf import to_lark
from lockstep.text.grammars.structured import Grammars
from tests.text.grammar_cases import GRAMMARS, KINDS, TOKENIZERS, allowed, allows, random_answer


def quoting(text):
    """Grammars that allow only this text, some of them in quotes."""
    escaped = re.escape(text)
    yield structured.choice([text])
    yield structured.regex(escaped)
    yield structured.lark("start: " + structured.quote(text))
    yield structured.lark(to_lark(f"root ::= {json.dumps(text)}"))
    yield structured.lark(to_lark(f"root ::= inner\ninner ::= {json.dumps(text)} | {json.dumps('(' + text)} inner"))
    yield structured.json_schema({"const": text})
    yield structured.json_schema({"enum": [text]})
    yield structured.json_schema(
        {"type": "object", "properties": {text: {"const": 1}}, "required": [text], "additionalProperties": False}
    )


@KINDS
@pytest.mark.parametrize("form", ["{}", "a{}b", "{0}{0}", "x {} y", "{}é", "日{}"])
def test_the_text_of_a_special_token_is_written_with_ordinary_ones(kind, form):
    tokenizer = TOKENIZERS[kind]
    for special in sorted(tokenizer.special_ids):
        text = form.format(tokenizer.backend.id_to_token(special))
        for seed, grammar in enumerate(quoting(text)):
            answer = random_answer(kind, grammar, np.random.default_rng(seed))
            assert answer is not None and text in answer, (text, grammar)


def test_a_token_that_ends_answers_is_no_text_though_it_is_not_marked_so():
    tokenizer = TOKENIZERS["byte_level"]
    end = tokenizer.backend.token_to_id("<tool call>")
    assert end not in tokenizer.special_ids
    grammars = Grammars(tokenizer, {end}, tokenizer.vocab_size)
    mask, ids = grammars.mask(structured.choice(["<tool call>!"])), []
    while end not in (options := allowed(mask(ids))):
        ids.append(int(max(options, key=lambda token: len(tokenizer.token_bytes(token)))))
    assert tokenizer.decode(ids) == "<tool call>!" and list(options) == [end]


BIG = 1 << 53


@pytest.mark.parametrize(
    "schema",
    [
        dict(minimum=BIG + 1),
        dict(minimum=BIG + 1, maximum=BIG + 5),
        dict(maximum=BIG + 3),
        dict(maximum=-BIG - 1),
        dict(exclusiveMinimum=BIG),
        dict(exclusiveMaximum=BIG + 4),
        dict(exclusiveMinimum=-BIG - 4, maximum=-BIG - 1),
        dict(minimum=0, maximum=(1 << 63) - 1),
        dict(minimum=-(1 << 61) - 1, exclusiveMaximum=(1 << 61) + 1),
        dict(exclusiveMinimum=BIG + 1, minimum=BIG + 7),
    ],
    ids=str,
)
def test_strict_ranges_of_large_integers_allow_nothing_outside(schema):
    grammar, checked = structured.json_schema(dict(type="integer", **schema)), 0
    for bound in schema.values():
        for value in [bound + step for step in (-4096, -1025, -3, -2, -1, 0, 1, 2, 3, 1025, 4096)]:
            if allows("byte_level", grammar, str(value)):
                jsonschema.validate(value, schema)
                checked += 1
    assert checked, "some are allowed"


@pytest.mark.parametrize(
    "schema, message",
    [
        (dict(type="number", maximum=BIG + 1), "maximum: beyond 2\\^53 it can be enforced for type integer only"),
        (dict(exclusiveMinimum=-1e40), "exclusiveMinimum: beyond"),
        (dict(patternProperties={"^k": {}}, additionalProperties=False, minProperties=2), "minProperties: at most 1"),
        (dict(additionalProperties=dict(type="integer"), required=["a"], minProperties=3), "minProperties: at most 2"),
        (dict(type="array", items=dict(minProperties=2)), "minProperties: at most 1"),
    ],
    ids=str,
)
def test_strict_refuses_numbers_that_are_not_held_to(schema, message):
    with pytest.raises(ValueError, match=message):
        structured.json_schema(schema)
    structured.json_schema(schema, strict=False)


def test_an_answer_may_end_where_its_grammar_does():
    tokenizer = TOKENIZERS["byte_level"]
    trigger, end = tokenizer.encode("q")[0], min(tokenizer.eos_ids)
    for once in (False, True):
        mask = GRAMMARS["byte_level"].mask(structured.choice(["a"]), trigger=trigger, once=once)
        assert mask([]) is None and mask([trigger]) is not None
        after = mask([trigger, *tokenizer.encode("a")])
        assert list(allowed(after)) == [end] if once else after is None
