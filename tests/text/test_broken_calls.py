"""Malformed and unfinished calls: arguments are valid JSON in any case, and no part of a mark gets into the text."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.serve.answers.content_blocks import collect
from lockstep.serve.routes.conversation_routes import count_calls
from lockstep.text.tool_calls.events import Arguments, CallStart, Content
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import (
    GEMMA,
    GRANITE,
    HARMONY,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    PHI,
    SEED,
    XML,
)
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.slowness import is_within
from tests.text.calls import BY_STYLE, parse, parser_of, ways_to_cut
from tests.text.test_tool_schemas import written, written_twice

USE = ToolUse(
    (
        Tool(
            "g",
            "",
            {
                "properties": {
                    "s": {"type": "string"},
                    "n": {"type": "integer"},
                    "l": {"type": "array"},
                    "t": {"type": ["string", "null"]},
                }
            },
        ),
        Tool("h", "", {}),
    )
)
ONE, NOTHING = ("g", '{"a": 1}'), ("h", "{}")
BEGIN = '<tool_call>\n{"name": "g", "arguments": '
FUNCTION = "<tool_call>\n<function=g>\n"
FUNCTION_END = "</function>\n</tool_call>"
SEED_FUNCTION = "<seed:tool_call>\n<function=g>\n"
MESSAGE_TO = "<|channel|>commentary to=functions."
SECOND = '\n<tool_call>\n{"name": "h", "arguments": {}}\n</tool_call>'
BROKEN = [
    # a call's JSON
    (HERMES, BEGIN + '{"s": "a\\u12"}}\n</tool_call>', [("g", '{"s": "a\\\\u12"}')]),
    (HERMES, BEGIN + '{"s": "a\\u12\\n\\ud"}}\n</tool_call>', [("g", '{"s": "a\\\\u12\\n\\\\ud"}')]),
    (HERMES,
     BEGIN + '{"s": "\\ud83d\\ude42", "\\uD83D": "\\ude42\\ud83d\\ud83d\\uDE42\\ud83d\\n\\ud83dx"}}\n</tool_call>',
     [("g", '{"s": "\\ud83d\\ude42", "\\ufffd": "\\ufffd\\ufffd\\ud83d\\uDE42\\ufffd\\n\\ufffdx"}')]),
    (HERMES, BEGIN + '{"s": "\\ud83d\\u12", "t": "\\ud83d\\u0041\\ud83d"}}\n</tool_call>',
     [("g", '{"s": "\\ufffd\\\\u12", "t": "\\ufffd\\u0041\\ufffd"}')]),
    (HERMES, '<tool_call>\n{"name": "g", "arguments": "{\\"s\\": \\"\\\\ud83d\\"}"}\n</tool_call>',
     [("g", '{"s": "\ufffd"}')]),
    (HERMES, BEGIN + '{"a": 1e999, "b": [-1e-999, -2E400], "c": 123456789012345678901}}\n</tool_call>',
     [("g", '{"a": null, "b": [-1e-999, null], "c": 123456789012345678901}')]),
    (XML, FUNCTION + '<parameter=l>\n["\\ud83d", 1e999]\n</parameter>\n' + FUNCTION_END,
     [("g", '{"l": ["\\ufffd", null]}')]),
    (LLAMA, '{"name": "g", "parameters": {"s": "a\\u"}}', [("g", '{"s": "a\\\\u"}')]),
    (HERMES, BEGIN + '{"a": 1}\n</tool_call>' + SECOND, [ONE, NOTHING]),
    (HERMES, BEGIN + '{"a": 1\n</tool_call>' + SECOND, [("g", '{"a": 1\n}'), NOTHING]),
    (HERMES, BEGIN + '{"a": [1, {"b": 2</tool_call>' + SECOND, [("g", '{"a": [1, {"b": 2}]}'), NOTHING]),
    (HERMES, BEGIN + '{"a": 1' + SECOND, [("g", '{"a": 1\n}'), NOTHING]),
    (HERMES, BEGIN + '{"a": 1}}}\n</tool_call>' + SECOND, [ONE, NOTHING]),
    (HERMES, BEGIN + '{"a": 1}]\n</tool_call>' + SECOND, [ONE, NOTHING]),
    (HERMES, BEGIN + '{"a": 1]}\n</tool_call>' + SECOND, [ONE, NOTHING]),
    (HERMES, BEGIN + '{"a": 1}} // as asked\n</tool_call>' + SECOND + " Done.", [ONE, NOTHING, "Done."]),
    (HERMES, BEGIN + '{"a": 1} // as asked\n}\n</tool_call>' + SECOND, [ONE, NOTHING]),
    (HERMES, BEGIN + '{"a": 1}, "b": {"c": [1, 2}]}\n</tool_call>' + SECOND, [ONE, NOTHING]),
    (HERMES, BEGIN + '{"a": 1}} Done.', [ONE, "Done."]),
    (HERMES, BEGIN + '{"a": 1}} ' + "x" * 300 + "</tool_call>", [ONE, "x" * 300 + "</tool_call>"]),
    (HERMES, '<tool_call>\n{"name": "", "arguments": {"a": 1}}\n</tool_call>',
     ['<tool_call>\n{"name": "", "arguments": {"a": 1}}\n</tool_call>']),
    (LLAMA, '{"name": "g", "parameters": {"a": 1}, "parameters": {"b": 2}}', [ONE]),
    (LLAMA, '{"name": "g", "parameters": {"a": 1}}}', [ONE]),
    (LLAMA, '{"name": "g", "parameters": {"a": 1}]', [ONE]),
    (LLAMA, '{"name": "g", "parameters": {"a": 1} // as asked\n}; {"name": "h", "parameters": {}}', [ONE, NOTHING]),
    (LLAMA, '{"name": "g", "parameters": {"a": 1}}}; {"name": "h", "parameters": {}}', [ONE, NOTHING]),
    (MISTRAL, '[TOOL_CALLS][{"name": "g", "arguments": {"a": 1}}}]', [ONE]),
    (MISTRAL, '[TOOL_CALLS][{"name": "g", "arguments": {"a": 1}]', [ONE]),
    (MISTRAL, '[TOOL_CALLS][{"name": "g", "arguments": {"a": 1}}, {"nam": 1}, ["a"]] Done.', [ONE, "Done."]),
    (MISTRAL, '[TOOL_CALLS][{"name": "g", "arguments": {"a": 1}} // one\n, {"name": "h"},]', [ONE, NOTHING]),
    (MISTRAL, "[TOOL_CALLS][]", ["[TOOL_CALLS][]"]),
    (MISTRAL_NAMED, '[TOOL_CALLS]g[ARGS]"{\\"a\\": 1}"[TOOL_CALLS]h[ARGS]{}', [ONE, NOTHING]),
    (MISTRAL_NAMED, '[TOOL_CALLS]g[ARGS]{"a": 1[TOOL_CALLS]h[ARGS]{}', [ONE, NOTHING]),
    (MISTRAL_NAMED, '[TOOL_CALLS]g[ARGS]{"a": [1, [2[TOOL_CALLS]h[ARGS]{}', [("g", '{"a": [1, [2]]}'), NOTHING]),
    (MISTRAL_NAMED, '[TOOL_CALLS]g[ARGS]{"a": 1}}[TOOL_CALLS]h[ARGS]{}', [ONE, NOTHING]),
    (MISTRAL_NAMED, '[TOOL_CALLS]g[TOOL_CALLS]h[ARGS]{}', ["[TOOL_CALLS]g", NOTHING]),
    (GRANITE, '<|tool_call|>[{"name": "g", "arguments": {"a": 1}] Done.', [ONE, "Done."]),
    (PHI, '<|tool_call|>[{"name": "g", "arguments": {"a": 1<|/tool_call|> Done.', [ONE, "Done."]),
    (PHI, '<|tool_call|>[{"name": "g", "arguments": {"a": 1}} // one\n<|/tool_call|><|tool_call|>[{"name": "h"}]',
     [ONE, NOTHING]),
    (HARMONY, f'{MESSAGE_TO}g json<|message|>{{"a": 1<|call|><|start|>assistant{MESSAGE_TO}h<|message|>{{}}',
     [ONE, NOTHING]),
    (HARMONY, f'{MESSAGE_TO}g json<|message|>{{"a": 1}}}} // as asked<|call|>', [ONE]),
    (HARMONY, f"{MESSAGE_TO}g json<|message|>none<|call|>", ["none"]),
    (HARMONY, f'{MESSAGE_TO}g json<|message|> [1<|call|><|start|>assistant{MESSAGE_TO}h<|message|>{{}}',
     [" [1", NOTHING]),
    (HARMONY, f"{MESSAGE_TO}g json<|message|> ", [" "]),
    (GEMMA, '<|tool_call>call:g{a:1<tool_call|>\n<|tool_call>call:h{}<tool_call|>', [("g", '{"a":1}'), NOTHING]),
    (GEMMA, '<|tool_call>call:g{l:[1,{a:<|"|>b<|"|><|tool_call>call:h{}<tool_call|>',
     [("g", '{"l":[1,{"a":"b"}]}'), NOTHING]),
    (GEMMA, '<|tool_call>call:g{s:<|"|>}<|tool_call>x<|"|> n:2,}}, so<tool_call|> Done.',
     [("g", '{"s":"}<|tool_call>x" , "n":2}'), "Done."]),
    (GEMMA, "<|tool_call>call:{}<tool_call|>", ["<|tool_call>call:{}<tool_call|>"]),
    (GEMMA, "<|tool_call>g(a=1)<tool_call|>", ["<|tool_call>g(a=1)<tool_call|>"]),
    # what stands there as plain text
    (XML, FUNCTION + "<parameter=s>\nx\n</parameter>\n<foo>\n" + FUNCTION_END, [("g", '{"s": "x"}')]),
    (XML, FUNCTION + "<parameter=s>\nx\n</parameter>\nand a < b\n" + FUNCTION_END, [("g", '{"s": "x"}')]),
    (XML, FUNCTION + '<parameter name="n">\n5\n</parameter>\n<parameter=s>\nx\n</parameter>\n' + FUNCTION_END,
     [("g", '{"n": 5, "s": "x"}')]),
    (XML, FUNCTION + "<parameter=n>\n5\n" + FUNCTION_END, [("g", '{"n": 5}')]),
    (XML, FUNCTION + "<parameter=n>\n5\n<parameter=s>\nx\n</parameter>\n" + FUNCTION_END,
     [("g", '{"n": 5, "s": "x"}')]),
    (XML, FUNCTION + "</function>\n</parameter>\n so </function>\n", [("g", "{}")]),
    (XML, FUNCTION + "<parameter=n>\n5\n</tool_call>\n" + FUNCTION + FUNCTION_END, [("g", '{"n": 5}'), ("g", "{}")]),
    (XML, FUNCTION + '<parameter=l>\n["a\n</parameter>\n<parameter=n>\n5\n</parameter>\n' + FUNCTION_END,
     [("g", '{"l": "[\\"a", "n": 5}')]),
    (XML, FUNCTION + "<parameter=s>\nx\n" + FUNCTION_END, [("g", '{"s": "x"}')]),
    (XML, FUNCTION + "<parameter=t>\nnull\n" + FUNCTION_END + " Done.", [("g", '{"t": null}'), "Done."]),
    (XML, FUNCTION + "<parameter=s>\na </function> b\n" + FUNCTION_END, [("g", '{"s": "a </function> b"}')]),
    (XML, FUNCTION + "<parameter=s>\na\n" + FUNCTION_END + "\n</parameter>\n" + FUNCTION_END,
     [("g", json.dumps({"s": "a\n" + FUNCTION_END}))]),
    (XML, FUNCTION + "<parameter=s>\nx\n" + FUNCTION_END + "\n" + FUNCTION + "<parameter=s>\ny\n</parameter>\n"
     + FUNCTION_END, [("g", '{"s": "x"}'), ("g", '{"s": "y"}')]),
    (XML, FUNCTION + "<parameter=s>\nx\n</parameter>\n</tool_call>", [("g", '{"s": "x"}')]),
    (XML, FUNCTION + "<parameter=s>\nx\n</parameter>\n<function=h>\n" + FUNCTION_END, [("g", '{"s": "x"}'), NOTHING]),
    (XML, "<tool_call><function=></function></tool_call>", ["<tool_call><function=></function></tool_call>"]),
    (SEED, SEED_FUNCTION + "<parameter=n>5</parameter>\n</seed:tool_call>\n" + SEED_FUNCTION + "</function>\n",
     [("g", '{"n": 5}'), ("g", "{}")]),
    (SEED, SEED_FUNCTION + "<parameter=s>a </function>\n</tool_call>\n<tool_call>\n<function=</parameter></function>",
     [("g", json.dumps({"s": "a </function>\n</tool_call>\n<tool_call>\n<function="}))]),
    (SEED, SEED_FUNCTION + "<parameter=s>x</function>\n</seed:tool_call>" + SEED_FUNCTION + "</function>",
     [("g", '{"s": "x"}'), ("g", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize("style, text, expected", BROKEN, ids=[f"{s.name}-{i}" for i, (s, *_) in enumerate(BROKEN)])
def test_what_is_read_of_a_broken_call(style, text, expected):
    for pieces in ways_to_cut(text):
        assert parse(parser_of(style, USE), pieces) == expected, pieces


ENDED = [
    (HERMES, BEGIN + '{"a": 1', '{"a": ', '{"a": 1}'),
    (HERMES, BEGIN + '{"s": "abc', '{"s": "abc', '{"s": "abc"}'),
    (HERMES, BEGIN + '{"s": "a\\', '{"s": "a', '{"s": "a"}'),
    (HERMES, BEGIN + '{"s": "a\\u00', '{"s": "a', '{"s": "a"}'),
    (HERMES, BEGIN + '{"s', '{"s', '{"s": null}'),
    (HERMES, BEGIN + '{"s":', '{"s":', '{"s":null}'),
    (HERMES, BEGIN + '{"l": [1, tru', '{"l": [1', '{"l": [1, "tru"]}'),
    (MISTRAL_NAMED, '[TOOL_CALLS]g[ARGS]{"l": [', '{"l": ', '{"l": null}'),
    (XML, FUNCTION + "<parameter=n>\n5", '{"n": ', '{"n": 5}'),
    (XML, FUNCTION + "<parameter=l>\n[1, 2", '{"l": ', '{"l": [1, 2]}'),
    (XML, FUNCTION + "<parameter=s>\nab\n</para", '{"s": "ab', '{"s": "ab"}'),
    (XML, FUNCTION + "<parameter=s>\nab\n</parameter>\n<para", '{"s": "ab"', '{"s": "ab"}'),
    (XML, FUNCTION, "{", "{}"),
    (HARMONY, MESSAGE_TO + 'g json<|message|>{"s": "ab', '{"s": "ab', '{"s": "ab"}'),
    (GEMMA, '<|tool_call>call:g{s:<|"|>ab', '{"s":"ab', '{"s":"ab"}'),
    (GEMMA, '<|tool_call>call:g{s:<|"|>ab<|"', '{"s":"ab', '{"s":"ab"}'),
    (GEMMA, "<|tool_call>call:g{l:[1,tru", '{"l":[1', '{"l":[1,"tru"]}'),
    (GEMMA, "<|tool_call>call:g{s", "{", '{"s": null}'),
]  # fmt: skip


@pytest.mark.parametrize("style, text, cut, completed", ENDED, ids=range(len(ENDED)))
def test_arguments_that_the_answer_ends_in(style, text, cut, completed):
    """Arguments are completed, and the call is not to be run, unless the answer reached its maximum length."""
    for pieces in ways_to_cut(text):
        [(_, found)] = parse(parser_of(style, USE), pieces, is_cut=True)
        assert found.rstrip() == cut.rstrip()
        assert parse(parser_of(style, USE), pieces) == [("g", completed)]
    events = (parser := parser_of(style, USE)).push(text) + parser.finish()
    assert events[-1].is_cut and count_calls(events) == count_calls(events[-1:], 1) == 0


def test_an_answer_that_ends_behind_the_arguments_asks_for_the_call():
    for style, text in [
        (HERMES, BEGIN + '{"a": 1}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "g", "arguments": {"a": 1}}'),
        (XML, FUNCTION + "<parameter=s>\nx\n</function>\n</tool"),
    ]:
        events = (parser := CallParser(style, USE)).push(text) + parser.finish()
        assert count_calls(events) == 1, text


TAGS = ("tool_call>", "</function>", "</parameter>")
INSERTED = [
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    ":",
    ",",
    ";",
    "\\",
    "\\u12",
    "\\u",
    "\n",
    " ",
    "//",
    "<",
    ">",
    "</",
    "<foo>",
    "null",
    "None",
    "1",
    "a",
    "é",
    "}}",
    '"}',
    "}]",
    '", "',
    "tru",
    "\x01",
    "NaN",
    "-",
    ".",
    "/*",
    "`",
]
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "s": st.sampled_from(["", "x", "a\nb", 'q"\\', "</function>", "<b>"]),
        "n": st.integers(-5, 99),
        "l": st.lists(st.sampled_from([1, "a", None, {"k": []}]), max_size=3),
        "t": st.sampled_from([None, "y"]),
    },
)


@st.composite
def damaged(draw, style):
    """Two calls; the first one's arguments and the text after them are damaged, and may be cut off."""
    first, second = (written(style, "g", draw(VALUES)) for _ in range(2))
    text = written_twice(style, first, second)
    before = {
        "xml": "g>",
        "seed": "g>",
        "harmony": "<|message|>{",
        "mistral_named": "[ARGS]{",
        "gemma": "g{",
        "function_gemma": "g{",
    }
    mark = before.get(style.name, ": {")
    begin = first.index(mark) + len(mark)
    end = len(first.removesuffix(style.end or ""))
    part = text[begin:end]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(part)))
        stop = at + draw(st.integers(0, 6)) * draw(st.booleans())
        part = part[:at] + draw(st.sampled_from(["", *INSERTED])) + part[stop:]
    made = text[:begin] + part + text[end:]
    return made[: draw(st.integers(begin, len(made)))] if draw(st.booleans()) else made


@BY_STYLE
@settings(max_examples=80, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9))
def test_whatever_is_damaged_arguments_are_json_and_no_mark_is_text(style, data, seed):
    text = data.draw(damaged(style))
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(text) + 1), min(4, len(text))))
    ways = [text], list(text), [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found, *others = [parse(parser_of(style, USE), pieces) for pieces in ways]
    assert others == [found, found]
    assert isinstance(found[0], tuple) and found[0][0] == "g"
    for each in found:
        if isinstance(each, tuple):
            assert isinstance(json.loads(each[1], parse_constant=pytest.fail), dict)
        else:
            assert not any(mark in each for mark in (*style.marks, *(TAGS if style in (XML, SEED) else ())))
    events = (parser := parser_of(style, USE)).push(text) + parser.finish(is_cut=True)
    whole = [event for event in events if not isinstance(event, Content)]
    arguments = [
        "".join(e.text for e in whole if isinstance(e, Arguments) and e.index == start.index)
        for start in whole
        if isinstance(start, CallStart)
    ]
    for each in arguments[:-1]:
        json.loads(each)


@pytest.mark.parametrize(
    "text",
    [
        FUNCTION + "<parameter=s>\n" + "</function>\n=" * 8_000,
        FUNCTION + "<parameter=s>\n" + "<" * 40_000,
        FUNCTION + '<parameter=l>\n["' + "</parameter>" * 4_000,
        FUNCTION + "<" * 40_000,
        BEGIN + "{" + "<tool_call" * 4_000,
        BEGIN + '{"a": 1}}' + "}" * 40_000,
        "[TOOL_CALLS]" * 4_000,
        FUNCTION * 2_000,
        (FUNCTION + "<parameter=s>\n" + FUNCTION_END) * 1_200,
        '<|tool_call>call:g{s:<|"|>' + '<|"|' * 8_000,
        "<|tool_call>" * 4_000,
    ],
)
def test_a_long_broken_call_costs_no_more_than_its_length(text):
    style = GEMMA if text[1] == "|" else MISTRAL if text[0] == "[" else HERMES if text.startswith(BEGIN) else XML
    began = time.process_time()
    parse(CallParser(style, USE), list(text))
    assert is_within(time.process_time() - began, 4), "hardly two, and hours if it were quadratic"


def test_a_block_knows_that_the_answer_ended_in_it():
    for end, is_cut in [('{"a": 1', True), ('{"a": 1}', False), ('{"a": 1}}\n</tool_call> Done.', False)]:
        events = (parser := CallParser(HERMES, USE)).push(BEGIN + end) + parser.finish()
        assert [block.is_cut for block in collect(events)] == [is_cut] + [False] * ("Done" in end)
