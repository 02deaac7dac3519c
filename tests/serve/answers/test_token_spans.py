"""The tokens of each piece of an answer's text."""

import random

import pytest

from lockstep.engine.token_stream import Token
from lockstep.serve.answers.token_spans import TokenSpanParser
from lockstep.text.channels import ChannelParser
from lockstep.text.reasoning import PlainParser, ThoughtParser
from lockstep.text.tool_calls.events import Content
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import HERMES
from lockstep.text.tool_calls.tools import ToolUse
from tests.text.calls import EMPTY

CALL = '<tool_call>\n{"name": "now", "arguments": {"a": "is it"}}\n</tool_call>'
ANSWERS = [
    "",
    "Plain text, a word.",
    "  a <tool b",
    f"<think>It is it.</think>\n\nIt is {CALL} It is",
    f"{CALL}It",
    "<tool_call> no call </tool_call> \n and",
    '<tool_call>{"name": 3} is it',
]


def parser():
    return ThoughtParser(CallParser(HERMES, ToolUse((EMPTY,))))


@pytest.mark.parametrize("text", ANSWERS)
def test_tokens_of_each_text(text):
    """However an answer is cut into tokens (some are half a character), each token is given at most once, in order, and
    the tokens of a piece of text contain the whole piece."""
    for seed in range(50):
        rng = random.Random(seed)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(len(text) + 1)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        tokens = [Token(i, i, 0.0, None, piece) for i, piece in enumerate(pieces)]
        placed, events = TokenSpanParser(parser()), []
        for token in tokens:
            events += placed.push([token])
        events += placed.finish()
        texts = [event for event in events if isinstance(event, Content)]
        assert "".join(event.text for event in texts) == "".join(
            event.text for event in parser_events(text) if isinstance(event, Content)
        )
        told = [token.index for event in texts for token in event.tokens]
        assert told == sorted(set(told))
        joined = "".join(token.text for event in texts for token in event.tokens)
        assert all(event.text.strip() in joined for event in texts)


def parser_events(text):
    whole = parser()
    return whole.push(text) + whole.finish()


def test_tokens_without_text_belong_to_the_character_that_they_begin():
    placed = TokenSpanParser(PlainParser())
    texts = ["a", "", "", "\u00e9", "b", ""]
    events = placed.push([Token(i, i, 0.0, None, text) for i, text in enumerate(texts)]) + placed.finish()
    assert [(event.text, [token.index for token in event.tokens]) for event in events] == [
        ("a", [0]),
        ("\u00e9", [1, 2, 3]),
        ("b", [4]),
    ]


def test_letters_of_marks_are_not_those_of_the_text():
    marks = "<|channel|> analysis <|message|> a s <|end|> <|start|> assistant <|channel|> final <|message|> a l".split()
    placed = TokenSpanParser(ChannelParser(PlainParser()))
    events = placed.push([Token(i, i, 0.0, None, text) for i, text in enumerate(marks)]) + placed.finish()
    texts = [event for event in events if isinstance(event, Content)]
    assert [(event.text, [token.index for token in event.tokens]) for event in texts] == [("a", [11]), ("l", [12])]
