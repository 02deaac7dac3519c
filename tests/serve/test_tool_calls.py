"""Tool calls: what parsers find in answers, however those are cut into pieces, and what grammars hold a model to."""

import json
import random
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.serve import reasoning, structured
from lockstep.serve.http.chat_fields import NO_PARAMETERS
from lockstep.serve.reasoning import PlainParser, ThoughtParser
from lockstep.serve.tool_calls.events import Arguments, CallStart, Content, Reasoning
from lockstep.serve.tool_calls.grammar import Lark
from lockstep.serve.tool_calls.parser import CallParser
from lockstep.serve.tool_calls.styles import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, XML, style_of
from lockstep.serve.tool_calls.texts import alternatives
from lockstep.serve.tool_calls.tools import Tool, ToolUse, written_out
from tests.serve.test_structured import GRAMMARS, TOKENIZERS, allows, random_answer

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
    """The grammar of an answer that is nothing but calls."""
    rules = Lark(special or {})
    rules.rule("start", "calls")
    style.rules(rules, use.callable, use.parallel)
    return structured.compose(rules.text)


def merged(events):
    """Events with neighbouring pieces joined and ids left out: [text or (name, arguments) or Reasoning, ...]."""
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
    """Whole, each character alone, at every one position, and at random."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]
    rng = random.Random(text)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text))))
        yield [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


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
        ("{{ tools }}[AVAILABLE_TOOLS] [TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS] name [ARGS]", MISTRAL_NAMED),
        ("{{ tools }}Environment: ipython", LLAMA),
        ("{{ tools | tojson }}", HERMES),
        ("{{ messages }}", None),
    ],
)
def test_the_style_is_seen_in_the_template(template, style):
    assert style_of(template) is style


STYLES = [HERMES, XML, LLAMA, MISTRAL, MISTRAL_NAMED]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
@pytest.mark.parametrize("parallel", [False, True])
def test_what_a_grammar_holds_to_is_what_the_parser_reads(style, parallel):
    """Random answers under the grammar are calls whose arguments the schemas allow, and nothing else."""
    names, complete = set(), 0
    tools = (WEATHER, EMPTY)
    for seed in range(12):
        use = ToolUse(tools, must_call=True, parallel=parallel)
        answer = random_answer("byte_level", calls_grammar(style, use), np.random.default_rng(seed))
        found = parse(CallParser(style, use), list(answer or ""))
        complete += answer is not None
        assert answer is None or found and all(isinstance(call, tuple) for call in found)
        assert len(found) <= 1 or parallel
        for name, arguments in found:
            names.add(name)
            schema = next(tool.parameters for tool in tools if tool.name == name)
            jsonschema.validate(json.loads(arguments), schema)
    assert names == {"get_weather", "now"} and complete >= 6


def test_a_grammar_for_text_values():
    grammar = calls_grammar(XML, ToolUse((WEATHER,), must_call=True, parallel=False))
    call = "<tool_call>\n<function=get_weather>\n{}</function>\n</tool_call>"
    city, days = (f"<parameter={n}>\n{v}\n</parameter>\n" for n, v in (("city", '"b"\n\n<'), ("days", "3")))
    assert [allows("byte_level", grammar, call.format(p)) for p in (city, city + days, days, "", city + city)] == [
        True,
        True,
        False,
        False,
        False,
    ]


STRINGS = [
    (dict(type="string"), ["", "a\nb\n", "<p>", "x" * 3000], ["a</parameter>b"]),
    (dict(type="string", maxLength=3), ["", "日本語", "a\n"], ["abcd"]),
    (dict(type="string", minLength=2), ["ab", "a\nb"], ["", "a"]),
    (dict(type="string", pattern=r"^\d{2}/[a-z]+$"), ["12/ab"], ["12", "x12/ab", "12/ab ", "٢٢/ab"]),
    (dict(type="string", pattern="b|^c(?:x|y)|[|)]z$"), ["abc", "cx", "|z", "cyz"], ["", "xcx", "|za"]),
    (dict(type="string", pattern="a", maxLength=3), ["a", "xax", "\na\n"], ["xyz", "xxxa"]),
    (dict(type="string", format="date"), ["2024-02-29"], ["2024-13-01", "today"]),
    (dict(type="string", pattern="(?=a)", format="odd"), ["b"], []),
    (dict(type="string", format=[], pattern={}, maxLength="3", minLength=-1, enum=3), ["b"], []),
    (dict(enum=["a", "b\nc"]), ["a", "b\nc"], ["", "c"]),
    (dict(const=""), [""], ["null", "a"]),
    (dict(type=["string", "null"], maxLength=2), ["ab", "null", "5"], ["abc"]),
    (dict(anyOf=[dict(type="null"), {"$ref": "#/$defs/short"}]), ["ab", "null"], ["abc"]),
    (dict(enum=["a", None]), ["a", "null"], ["b"]),
    (dict(allOf=[{"$ref": "#/$defs/short"}]), ["ab"], ["abc"]),
    (dict(type=["string", "integer"]), ['"ab"', "5"], ["ab"]),
    (dict(type="array", items=dict(type="integer", maximum=3), maxItems=2), ["[1, 2]", "[]"], ["[1,2,3]", "[4]", "1"]),
    (dict(type="object", required=["a"], properties=dict(a=dict(type="number", minimum=0))), ['{"a": 0.5}'], ["{}"]),
]


def one_parameter(schema, strict=False):
    defs = {"$defs": dict(short=dict(type="string", maxLength=2))}
    return Tool("f", "", dict(type="object", properties=dict(a=schema), required=["a"], **defs), strict)


@pytest.mark.parametrize("schema, good, bad", STRINGS, ids=range(len(STRINGS)))
def test_a_parameter_in_xml_is_held_to_its_schema(schema, good, bad):
    use = ToolUse((one_parameter(schema),), must_call=True, parallel=False)
    grammar = calls_grammar(XML, use)
    call = "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n</tool_call>"
    assert [text for text in good + bad if allows("byte_level", grammar, call.format(text))] == good
    for text in good:
        [(_, arguments)] = parse(CallParser(XML, use), [call.format(text)])
        if bad:  # otherwise its keywords are not held to
            jsonschema.validate(json.loads(arguments), use.tools[0].parameters)


def test_references_that_lead_nowhere_end():
    loops = {f"d{i}": dict(anyOf=[{"$ref": f"#/$defs/d{j}"} for j in range(40)]) for i in range(40)}
    for reference in ("#/$defs/d0", "#", "#/$defs", "#/nowhere", "elsewhere", 5, None):
        assert alternatives({"$ref": reference}, {"$defs": loops})[0].get("type", "object") == "object"


@pytest.mark.parametrize("pattern", ["a/b", "a\nb", "a\\\nb", "a\\/b", "[/]", "a\\\rb"])
def test_patterns_cannot_leave_their_place_in_the_grammar(pattern):
    grammar = calls_grammar(XML, ToolUse((one_parameter(dict(type="string", pattern=pattern)),)))
    assert json.loads(grammar)["grammars"][0]["lark_grammar"].count("\n") == json.loads(
        calls_grammar(XML, ToolUse((one_parameter(dict(type="string", pattern="a")),)))
    )["grammars"][0]["lark_grammar"].count("\n")
    GRAMMARS["byte_level"].mask(grammar)


def test_null_stands_there_without_quotes_and_so_does_a_text():
    use = ToolUse((one_parameter(dict(type=["string", "null"])),))
    call = "<tool_call><function=f><parameter=a>\n{}\n</parameter></function></tool_call>"
    found = [
        json.loads(parse(CallParser(XML, use), [call.format(text)])[0][1])["a"]
        for text in ("null", "None", "5", '"q"', "true", "")
    ]
    assert found == [None, None, "5", '"q"', "true", ""]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
def test_a_named_tool_is_the_only_one(style):
    use = ToolUse(TOOLS, must_call=True, allowed=("now",), parallel=False)
    answer = random_answer("gguf", calls_grammar(style, use), np.random.default_rng(0))
    assert [name for name, _ in parse(CallParser(style, USE), [answer])] == ["now"]


def test_marks_that_are_special_tokens_are_named_by_their_id():
    grammar = calls_grammar(MISTRAL, ToolUse((EMPTY,), must_call=True, parallel=False), {"[TOOL_CALLS]": 1})
    mask, tokenizer = GRAMMARS["byte_level"].mask(grammar), TOKENIZERS["byte_level"]
    words = mask([])
    assert [i for i in range(tokenizer.vocab_size) if words[i // 32] >> (i % 32) & 1] == [1]
    ids = [1, *tokenizer.encode('[{"name": "now", "arguments": {}}]'), 0]
    assert all(mask(ids[:n])[ids[n] // 32] >> (ids[n] % 32) & 1 for n in range(len(ids)))


@pytest.mark.parametrize("make, message", [
    (lambda: Tool("bad name", "", {}), "a name has"),
    (lambda: Tool("x" * 129, "", {}), "a name has"),
    (lambda: Tool(None, "", {}), "a name has"),
    (lambda: Tool("x", "", []), "expected a JSON schema"),
    (lambda: ToolUse((EMPTY, EMPTY)), "now is there more than once"),
    (lambda: ToolUse(TOOLS, allowed=("other",)), "no tool 'other'"),
    (lambda: ToolUse((), must_call=True), "there are no tools"),
    (lambda: ToolUse(tuple(Tool(f"t{i}", "", {}) for i in range(257))), "at most 256"),
    (lambda: calls_grammar(XML, ToolUse((Tool("x", "", dict(properties=3)),)), {}), "parameters of x"),
    (lambda: calls_grammar(XML, ToolUse((Tool("x", "", dict(properties={}, required=3)),)), {}), "parameters of x"),
    (lambda: GRAMMARS["gguf"].mask(calls_grammar(
        HERMES, ToolUse((Tool("x", "", dict(uniqueItems=True), strict=True),)))), "uniqueItems"),
    (lambda: calls_grammar(XML, ToolUse((one_parameter(dict(type="string", pattern="(?=a)"), True),))), "pattern: "),
    (lambda: calls_grammar(XML, ToolUse((one_parameter(dict(type="string", format="odd"), True),))), "format: 'odd'"),
])  # fmt: skip
def test_mistakes_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_instructions_for_templates_without_tools():
    text = written_out(ToolUse(TOOLS))
    assert all(json.dumps(tool.parameters) in text for tool in TOOLS)


@pytest.mark.parametrize("opened", [True, False])
def test_a_grammar_behind_a_thought(opened):
    rules = Lark({})
    rules.rule("start", reasoning.add_rules(rules, opened), "@answer")
    answers = structured.choice(["yes", "no"]), structured.regex("yes|no"), structured.lark('start: "yes" | "no"')
    for answer in answers:
        grammar = structured.compose(rules.text, answer)
        for text, good in [
            ("Hm.</think>\n\nyes", opened),
            ("<think>Hm </th</think>no", True),
            ("yes", not opened),
            ("Hm</think>maybe", False),
        ]:
            assert allows("byte_level", grammar, text) == good, (text, opened)


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


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(FRAGMENTS), max_size=25), opened=st.booleans())
def test_any_text_gives_the_same_events_however_it_is_cut(style, pieces, opened):
    text = "".join(pieces)
    made = [parse(ThoughtParser(CallParser(style, USE), opened), each) for each in ([text], pieces, list(text))]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "parameters",
    [NO_PARAMETERS, dict(type="object", properties={}), dict(properties={}, required=[], title="none")],
    ids=str,
)
def test_a_function_without_parameters_takes_none(style, parameters):
    use = ToolUse((Tool("now", "", parameters),), must_call=True, parallel=False)
    for seed in range(3):
        answer = random_answer("byte_level", calls_grammar(style, use), np.random.default_rng(seed))
        [(_, arguments)] = parse(CallParser(style, use), [answer])
        assert json.loads(arguments) == {}
