"""Grammars of tool calls: the parsers read every call that a grammar allows, and its arguments fit the schema."""

import json

import jsonschema
import numpy as np
import pytest

from lockstep.text import reasoning
from lockstep.text.grammars import structured
from lockstep.text.tool_calls.grammar import Lark
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import HERMES, MISTRAL, XML
from lockstep.text.tool_calls.texts import alternatives
from lockstep.text.tool_calls.tools import NO_PARAMETERS, Tool, ToolUse
from tests.text.calls import BY_STYLE, EMPTY, TOOLS, USE, WEATHER, calls_grammar, parse, parser_of
from tests.text.grammar_cases import GRAMMARS, TOKENIZERS, allows, random_answer


@BY_STYLE
@pytest.mark.parametrize("parallel", [False, True])
def test_what_a_grammar_holds_to_is_what_the_parser_reads(style, parallel):
    """Random answers under the grammar are calls whose arguments the schemas allow, and nothing else."""
    names, complete = set(), 0
    tools = (WEATHER, EMPTY)
    for seed in range(12):
        use = ToolUse(tools, must_call=True, parallel=parallel)
        answer = random_answer("byte_level", calls_grammar(style, use), np.random.default_rng(seed))
        found = parse(parser_of(style, use), list(answer or ""))
        complete += answer is not None
        assert answer is None or (found and all(isinstance(call, tuple) for call in found))
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


@BY_STYLE
def test_a_named_tool_is_the_only_one(style):
    use = ToolUse(TOOLS, must_call=True, allowed=("now",), parallel=False)
    answer = random_answer("gguf", calls_grammar(style, use), np.random.default_rng(0))
    assert [name for name, _ in parse(parser_of(style, USE), [answer])] == ["now"]


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


@pytest.mark.parametrize("marks", reasoning.MARKS, ids=lambda marks: f"{marks.open}{marks.answer or ''}")
@pytest.mark.parametrize("opened", [True, False])
def test_a_grammar_behind_a_thought(opened, marks):
    rules = Lark({})
    rules.rule("start", reasoning.add_rules(rules, marks, opened), "@answer")
    begin, close = marks.open + f"{marks.label}\n" * bool(marks.label), marks.close
    answers = structured.choice(["yes", "no"]), structured.regex("yes|no"), structured.lark('start: "yes" | "no"')
    for answer in answers:
        grammar = structured.compose(rules.text, answer)
        for text, good in [
            (f"Hm.{close}\n\nyes", opened),
            (f"{begin}Hm {close[:4]}{close}no", True),
            ("yes", not opened),
            (f"Hm{close}maybe", False),
        ]:
            assert allows("byte_level", grammar, text) == good, (text, opened)


@BY_STYLE
@pytest.mark.parametrize(
    "parameters",
    [NO_PARAMETERS, dict(type="object", properties={}), dict(properties={}, required=[], title="none")],
    ids=str,
)
def test_a_function_without_parameters_takes_none(style, parameters):
    use = ToolUse((Tool("now", "", parameters),), must_call=True, parallel=False)
    for seed in range(3):
        answer = random_answer("byte_level", calls_grammar(style, use), np.random.default_rng(seed))
        [(_, arguments)] = parse(parser_of(style, use), [answer])
        assert json.loads(arguments) == {}
