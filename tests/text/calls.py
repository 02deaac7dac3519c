"""Shared by tests of tool calls: tools, running parsers on pieces of text, and grammars of answers of calls only."""

import random

import pytest

from lockstep.text.channels import ChannelParser
from lockstep.text.grammars import structured
from lockstep.text.tool_calls.events import Arguments, CallStart, Content
from lockstep.text.tool_calls.grammar import Lark
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import HARMONY, STYLES
from lockstep.text.tool_calls.tools import Tool, ToolUse

WEATHER = Tool(
    "get_weather",
    "The weather.",
    dict(
        type="object",
        description="as %json: x",
        required=["city"],
        additionalProperties=False,
        properties=dict(
            city=dict(type="string", maxLength=6),
            days=dict(type="integer", minimum=1, maximum=9),
            units=dict(enum=["C", "F"]),
            tags={"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tag"}},
        ),
        **{"$defs": dict(tag=dict(enum=["wind", "rain"]))},
    ),
)
EMPTY = Tool("now", "The time.", dict(type="object", properties={}, additionalProperties=False))
TOOLS = (WEATHER, EMPTY)
USE = ToolUse(TOOLS)
CITY = '{"city": "Paris"}'


def calls_grammar(style, use, special=None):
    """The grammar of an answer that consists of calls only."""
    rules = Lark(special or {})
    rules.rule("start", "calls")
    style.rules(rules, use.callable, use.parallel)
    return structured.compose(rules.text)


def merged(events):
    """Events with adjacent pieces joined and ids left out: [text or (name, arguments) or Reasoning, ...]."""
    made = []
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == sum(isinstance(m, list) for m in made) and len(event.id) == 9
            made.append([event.name, ""])
        elif isinstance(event, Arguments):
            assert made[-1][0] and event.index == sum(isinstance(m, list) for m in made) - 1
            made[-1][1] += event.text
        elif made and type(made[-1]) is type(event):
            made[-1] = type(event)(made[-1].text + event.text)
        else:
            made.append(event)
    return [m.text if isinstance(m, Content) else tuple(m) if isinstance(m, list) else m for m in made]


def parse(parser, pieces, is_cut=False):
    return merged([event for piece in pieces for event in parser.push(piece)] + parser.finish(is_cut))


def ways_to_cut(text):
    """Ways to cut a text: not at all, into characters, into two at every position, and at random."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
    rng = random.Random(text)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text))))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


BY_STYLE = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)


def parser_of(style, use):
    """The parser of an answer with calls of a style; Harmony's calls are messages among others."""
    parser = CallParser(style, use)
    return ChannelParser(parser, calls=True) if style is HARMONY else parser
