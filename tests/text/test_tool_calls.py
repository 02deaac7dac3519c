"""Tool calls and thoughts: what parsers find in answers, however those are cut into pieces."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.text.reasoning import PlainParser, ThoughtParser
from lockstep.text.tool_calls.events import Reasoning
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import (
    GEMMA,
    GRANITE,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    PHI,
    SEED,
    XML,
    style_of,
)
from lockstep.text.tool_calls.tools import ToolUse, written_out
from tests.text.calls import BY_STYLE, CITY, TOOLS, USE, parse, parser_of, ways_to_cut

WEATHER_CALL = ("get_weather", CITY)
ANSWERS = [
    (HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', [WEATHER_CALL]),
    (HERMES, 'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
             '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
     ["Let me see.", WEATHER_CALL, ("now", "{}")]),
    (HERMES, '<tool_call>{"arguments":{"a":"}\\"{<tool_call>"},"id":[1,{}],"name":"f"}</tool_call> Done.',
     [("f", '{"a":"}\\"{<tool_call>"}'), "Done."]),
    (HERMES, '<tool_call>{"name":"now"}</tool_call>', [("now", "{}")]),
    (HERMES, '<tool_call>{"name":"f","n":-1.5e3 ,"parameters":"{\\"a\\": 1}"}', [("f", '{"a": 1}')]),
    (HERMES, "a < b <tool_ call> <tool", ["a < b <tool_ call> <tool"]),
    (HERMES, "  indented\n\ntext \n", ["  indented\n\ntext \n"]),
    (HERMES, "<tool_call>\nnot json</tool_call> and on", ["<tool_call>\nnot json</tool_call> and on"]),
    (HERMES, 'so: <tool_call>\n{"nam": 1}', ['so: <tool_call>\n{"nam": 1}']),
    (HERMES, 'so: <tool_call>\n{"name": "get', ['so: <tool_call>\n{"name": "get']),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"city": "Par', [("f", '{"city": "Par"}')]),
    (HERMES, "", []),
    (XML, "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
          "</parameter>\n</function>\n</tool_call>", [("get_weather", '{"city": "Paris", "days": 3}')]),
    (XML, 'Hm.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"a"\n\n<b>\n</parameter>\n<parameter=tags>\n'
          '["wind"]\n</parameter>\n<parameter=other>5</parameter></function>\n</tool_call>',
     ["Hm.", ("get_weather", '{"city": "\\"a\\"\\n\\n<b>", "tags": ["wind"], "other": "5"}')]),
    (XML, "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n"
          "</tool_call>",
     [("now", "{}"), ("now", "{}")]),
    (XML, "<tool_call>\n<function=get_weather>\n<parameter=days>\nmany\n</parameter>\n</function>\n</tool_call>",
     [("get_weather", '{"days": "many"}')]),
    (XML, "<tool_call> no </tool_call>", ["<tool_call> no </tool_call>"]),
    (SEED, "Hm.\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n\n</parameter>\n"
           "<parameter=tags>['wind', True]</parameter>\n<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
     ["Hm.", ("get_weather", '{"city": "\\nParis\\n\\n", "tags": ["wind", true], "days": 3}')]),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}', [WEATHER_CALL]),
    (LLAMA, '\n<|python_tag|>{"type": "function", "name": "now", "parameters": {}}; {"name": "now", "parameters": {}}',
     [("now", "{}"), ("now", "{}")]),
    (LLAMA, '{"name": "Bob", "age": 3}', ['{"name": "Bob", "age": 3}']),
    (LLAMA, '{"name": "Bob"} is JSON', ['{"name": "Bob"} is JSON']),
    (LLAMA, ' {"a": {"name": "now", "parameters": {}}}', [' {"a": {"name": "now", "parameters": {}}}']),
    (LLAMA, 'Text {"name": "now", "parameters": {}}', ['Text {"name": "now", "parameters": {}}']),
    (MISTRAL, '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
              '{"name": "now", "arguments": {}}]', [WEATHER_CALL, ("now", "{}")]),
    (MISTRAL_NAMED, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}',
     [WEATHER_CALL, ("now", "{}")]),
    (MISTRAL_NAMED, '[TOOL_CALLS]get_weather{"city": "Paris"}', [WEATHER_CALL]),
    (MISTRAL, "[TOOL_CALLS] [1]", ["[TOOL_CALLS] [1]"]),
]  # fmt: skip


@pytest.mark.parametrize("style, text, expected", ANSWERS, ids=[f"{s.name}-{i}" for i, (s, *_) in enumerate(ANSWERS)])
def test_calls_are_found_however_the_text_is_cut(style, text, expected):
    for pieces in ways_to_cut(text):
        assert parse(CallParser(style, USE), pieces) == expected, pieces


def test_arguments_come_as_they_are_written():
    parser = CallParser(HERMES, USE)
    assert parser.push('<tool_call>{"name": "f", "argum') == []
    start, piece = parser.push('ents": {"ci')
    assert (start.name, piece.text) == ("f", '{"ci')
    assert [e.text for e in parser.push('ty": 1')] == ['ty": ']
    assert [e.text for e in parser.push("}}")] == ["1}"], "what has no quotes is told when it is known what it is"


def test_the_cost_of_a_long_answer_is_linear():
    parser = CallParser(XML, USE)
    parser.push("<tool_call><function=get_weather><parameter=city>")
    for _ in range(20_000):
        assert len(parser.push("some text of a file ")) == 1


THOUGHTS = [
    ("<think>\nWell.\n</think>\n\nYes.", False, [Reasoning("Well."), "Yes."]),
    ("\n <think>a < b </thin </think>x", False, [Reasoning("a < b </thin"), "x"]),
    ("\nWell,\n\nyes.\n</think>\n\n Yes.", True, [Reasoning("Well,\n\nyes."), "Yes."]),
    ("</think>Yes.", True, ["Yes."]),
    ("<think>\n\n</think>\n\nYes.", False, ["Yes."]),
    ("No thought <think>at</think> all", False, ["No thought <think>at</think> all"]),
    ("<thin", False, ["<thin"]),
    ("  plain ", False, ["  plain "]),
    ("<think>cut </th", False, [Reasoning("cut </th")]),
    ("cut", True, [Reasoning("cut")]),
    ("", True, []),
    ("", False, []),
]


@pytest.mark.parametrize("text, opened, expected", THOUGHTS)
def test_thoughts_are_split_off_however_the_text_is_cut(text, opened, expected):
    for pieces in ways_to_cut(text):
        assert parse(ThoughtParser(PlainParser(), opened), pieces) == expected, pieces


def test_a_thought_before_a_call():
    text = '<think>\nI call <tool_call>\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for pieces in ways_to_cut(text):
        parser = ThoughtParser(CallParser(HERMES, USE))
        assert parse(parser, pieces) == [Reasoning("I call <tool_call>"), ("now", "{}")]


@pytest.mark.parametrize(
    "template, style",
    [
        ("{{ tools }} <tool_call>{'name': name}</tool_call>", HERMES),
        ("{{ tools }} <tool_call><function=x><parameter=y>", XML),
        ("{{ tools }} <seed:tool_call><function=x><parameter=y>", SEED),
        ("{{ tools }}[AVAILABLE_TOOLS] [TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS] name [ARGS]", MISTRAL_NAMED),
        ("{{ tools }}Environment: ipython", LLAMA),
        ("{{ tools }}<|tool_call|> and a JSON list", GRANITE),
        ("{{ tools }}<|tool_call|>{{ call }}<|/tool_call|>", PHI),
        ("<|tool|>{{ m.tools }}<|/tool|>", PHI),
        ("{{ tools }}<|tool_call>call:{{ name }}<tool_call|>", GEMMA),
        ("{{ tools | tojson }}", HERMES),
        ("{{ messages }}", None),
    ],
)
def test_the_style_is_seen_in_the_template(template, style):
    assert style_of(template) is style


def test_instructions_for_templates_without_tools():
    text = written_out(ToolUse(TOOLS))
    assert all(json.dumps(tool.parameters) in text for tool in TOOLS)


def test_only_the_first_call_where_they_may_not_be_parallel():
    text = '<tool_call>{"name": "now"}</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call> Done.'
    assert parse(CallParser(HERMES, replace(USE, parallel=False)), list(text)) == [("now", "{}"), "Done."]


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
    ">",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    '<|"|>',
    "call:",
    "<|channel|>",
    "<|message|>",
    "<|call|>",
    " to=functions.",
    "<think>",
    "</think>",
    "\n",
    " ",
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    ";",
    "\\",
    '{"name": "now"',
    '"arguments": {',
    '"parameters":',
    "city",
    "days",
    "now",
    "3",
    "é",
    "<",
    "/",
]


@BY_STYLE
@settings(max_examples=80, deadline=None)
@given(pieces=st.lists(st.sampled_from(FRAGMENTS), max_size=25), opened=st.booleans())
def test_any_text_gives_the_same_events_however_it_is_cut(style, pieces, opened):
    text = "".join(pieces)
    made = [parse(ThoughtParser(parser_of(style, USE), opened), each) for each in ([text], pieces, list(text))]
    assert made[0] == made[1] == made[2]
