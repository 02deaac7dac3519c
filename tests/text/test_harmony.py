"""Harmony: the channels of gpt-oss's answers, its calls, its prompts and what ends its answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.text.channels import ChannelParser, beginning
from lockstep.text.conversation import ChatModel, Conversation
from lockstep.text.grammars import structured
from lockstep.text.reasoning import PlainParser
from lockstep.text.tokenizer.end_mark import with_call_ends
from lockstep.text.tokenizer.tokenizer import Tokenizer
from lockstep.text.tool_calls.events import Reasoning
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import HARMONY, style_of
from lockstep.text.tool_calls.tools import ToolUse
from tests.text.calls import CITY, TOOLS, USE, parse, ways_to_cut
from tests.text.harmony import MARKS, TEMPLATE
from tests.text.vocabularies import byte_level

CALL = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CITY}"
NEXT = "<|end|><|start|>assistant"
ANSWERS = [
    ("<|channel|>final<|message|>Hello.", ["Hello."]),
    ("<|channel|>final<|message|>Hello.<|return|>", ["Hello."]),
    (f"<|channel|>analysis<|message|>Hm. {NEXT}<|channel|>final<|message|> a < b\n", [Reasoning("Hm. "), " a < b\n"]),
    (f"<|channel|>analysis<|message|>Call.{NEXT}{CALL}<|call|>", [Reasoning("Call."), ("get_weather", CITY)]),
    (f"<|channel|>analysis<|message|>Call.{NEXT}{CALL}", [Reasoning("Call."), ("get_weather", CITY)]),
    (f" to=functions.get_weather<|channel|>commentary json<|message|>{CITY}<|call|>", [("get_weather", CITY)]),
    (f"<|channel|>commentary<|message|>I look.{NEXT}{CALL}", ["I look.", ("get_weather", CITY)]),
    (f"<|channel|>analysis<|message|>a{NEXT}<|channel|>analysis<|message|>b", [Reasoning("ab")]),
    ('<|channel|>commentary to=functions.now json<|message|>{"a": "<|call', [("now", '{"a": "<|call"}')]),
    ("<|channel|>analysis<|message|>cut <|en", [Reasoning("cut <|en")]),
    ("<|channel|>final<|message|>to=functions.x <|chan", ["to=functions.x <|chan"]),
    ("<|channel|>final<|message|>One.<|start|>assistant<|channel|>final<|message|> Two.", ["One. Two."]),
    ("<|channel|>analysis to=browser.search code<|message|>{}<|call|>", [Reasoning("{}")]),
    ("No header at all", ["No header at all"]),
    ("<|channel|>fin", []),
    ("a", ["a"]),
    (f"<|channel|>{'x' * 600}<|message|>y", [f"<|channel|>{'x' * 600}<|message|>y"]),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", ANSWERS, ids=range(len(ANSWERS)))
def test_channels_are_told_apart_however_the_text_is_cut(text, expected):
    for pieces in ways_to_cut(text):
        assert parse(ChannelParser(CallParser(HARMONY, USE), calls=True), pieces) == expected, pieces


FRAGMENTS = [
    *MARKS,
    "assistant",
    "analysis",
    "final",
    "commentary",
    " to=functions.now",
    "json",
    '{"a": ',
    "1}",
    "<|",
    " ",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.booleans())
def test_any_text_is_read_the_same_however_it_is_cut(fragments, is_cut):
    text = "".join(fragments)
    new = lambda: ChannelParser(CallParser(HARMONY, USE), calls=True)
    assert parse(new(), [text], is_cut) == parse(new(), list(text), is_cut)
    assert parse(new(), [text], is_cut) == parse(new(), fragments, is_cut)


def test_calls_without_tools_are_text():
    for pieces in ways_to_cut(CALL):
        assert parse(ChannelParser(PlainParser()), pieces) == [CITY]


def test_an_answer_that_the_prompt_has_begun():
    for begun, text, expected in (
        ("<|channel|>final<|message|>Well, ", "yes.", ["yes."]),
        ("<|channel|>analysis<|message|>", f"Hm.{NEXT}<|channel|>final<|message|>Yes.", [Reasoning("Hm."), "Yes."]),
        ("", "<|channel|>final<|message|>Yes.", ["Yes."]),
    ):
        for pieces in ways_to_cut(text):
            parser = ChannelParser(CallParser(HARMONY, USE), begun, True)
            assert parse(parser, pieces) == expected, (begun, pieces)


# ------------------------------------------------------------ a model


@pytest.fixture(scope="module")
def made():
    """(tokenizer, ChatModel)."""
    backend = byte_level()
    backend.add_special_tokens(list(MARKS))
    tokenizer = Tokenizer(backend, frozenset({0}), None, {}, {"default": TEMPLATE})
    return tokenizer, ChatModel(tokenizer, {0}, tokenizer.vocab_size)


USER = [dict(role="user", content="hello")]
CALLED = [
    *USER,
    dict(
        role="assistant",
        content=None,
        reasoning_content="I look.",
        tool_calls=[dict(id="call_1", type="function", function=dict(name="get_weather", arguments=dict(city="Rome")))],
    ),
    dict(role="tool", tool_call_id="call_1", content="sun"),
]


def test_a_template_of_channels_is_seen(made):
    _, chat = made
    assert style_of(TEMPLATE) is HARMONY and chat.style is HARMONY and chat.thinking is None


def test_prompts(made):
    _, chat = made
    prompt = chat.prompt(Conversation(CALLED, USE))
    assert prompt.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>I look.<|end|>"
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
        '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"sun"<|end|><|start|>assistant'
    )
    assert "type get_weather = " in prompt and "You can call functions" not in prompt and beginning(prompt) == ""
    begun = Conversation([*USER, dict(role="assistant", content="Well, ")], continues=True)
    assert beginning(chat.prompt(begun)) == "<|channel|>final<|message|>Well, "
    assert "Reasoning: high" in chat.prompt(Conversation(USER, variables=dict(reasoning_effort="high")))


def test_marks_reach_the_parser(made):
    _, chat = made
    for use in (ToolUse(), USE):
        prepared = chat.prepare(Conversation(USER, use))
        assert prepared.options["skip_special_tokens"] is False
        assert parse(prepared.new_parser(), ["<|channel|>final<|message|>Hi."]) == ["Hi."]
    prepared = chat.prepare(Conversation([*USER, dict(role="assistant", content="Well, ")], continues=True))
    assert parse(prepared.new_parser(), ["yes."]) == ["yes."]


def accepts(tokenizer, mask, text):
    """Whether a mask allows all tokens of a text, and then its end."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for at, token_id in enumerate([*ids, 0]):
        words = mask(ids[:at])
        if words is not None and token_id not in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")):
            return False
    return True


THOUGHT = f"<|channel|>analysis<|message|>Well.{NEXT}"


def test_a_call_that_must_come(made):
    tokenizer, chat = made
    use = ToolUse(TOOLS, must_call=True)
    mask = lambda: chat.prepare(Conversation(USER, use)).options["logits_mask"]
    assert accepts(tokenizer, mask(), CALL) and accepts(tokenizer, mask(), THOUGHT + CALL)
    assert not accepts(tokenizer, mask(), "<|channel|>final<|message|>No.")
    assert not accepts(tokenizer, mask(), CALL.replace("city", "town"))
    assert not accepts(tokenizer, mask(), CALL.replace("get_weather", "get_time"))


def test_a_call_that_must_come_in_an_answer_that_the_prompt_has_begun(made):
    tokenizer, chat = made
    begun = [*USER, dict(role="assistant", content="Well, ")]
    prepared = chat.prepare(Conversation(begun, ToolUse(TOOLS, must_call=True), continues=True))
    mask = prepared.options["logits_mask"]
    assert accepts(tokenizer, mask, NEXT + CALL)
    for pieces in ways_to_cut(NEXT + CALL):
        assert parse(prepared.new_parser(), pieces) == [("get_weather", CITY)]
    again = chat.prepare(Conversation(begun, ToolUse(TOOLS, must_call=True), continues=True))
    assert not accepts(tokenizer, again.options["logits_mask"], CALL)


def test_an_answer_with_a_form(made):
    tokenizer, chat = made
    grammar = structured.json_schema(dict(type="object", properties=dict(a=dict(type="integer")), required=["a"]))
    mask = lambda: chat.prepare(Conversation(USER, grammar=grammar)).options["logits_mask"]
    final = '<|channel|>final<|message|>{"a": 1}'
    assert accepts(tokenizer, mask(), final) and accepts(tokenizer, mask(), THOUGHT + final)
    assert not accepts(tokenizer, mask(), '{"a": 1}') and not accepts(tokenizer, mask(), final.replace("1", '"x"'))
    begun = [*USER, dict(role="assistant", content='{"a"')]
    mask = chat.prepare(Conversation(begun, grammar=structured.choice([": 1}"]), continues=True)).options["logits_mask"]
    assert accepts(tokenizer, mask, ": 1}")


def test_what_ends_an_answer(made):
    """A call ends it, and the end of a message does not."""
    tokenizer, _ = made
    ids = {mark: tokenizer.backend.token_to_id(mark) for mark in MARKS}
    ended = Tokenizer(tokenizer.backend, frozenset({5, ids["<|end|>"]}), None, {}, {})
    assert with_call_ends(ended) == {5, ids["<|return|>"], ids["<|call|>"]}
    others = Tokenizer(byte_level(), frozenset({0}), None, {}, {})
    assert with_call_ends(others) == {0}
