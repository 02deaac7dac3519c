"""Schemas of tools of every shape: in each style, the grammar allows exactly arguments that fit the schema."""

import json

import jsonschema
import numpy as np
import pytest

from lockstep.text.tool_calls.events import Arguments, CallStart
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.shapes import MAX_SHAPES, Shape, shapes
from lockstep.text.tool_calls.styles import SEED, STYLES, XML
from lockstep.text.tool_calls.texts import matches
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text.calls import BY_STYLE, calls_grammar, parse, parser_of
from tests.text.grammar_cases import GRAMMARS, allows, random_answer

X = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False}
Y = {"type": "object", "properties": {"y": {"enum": [1, 2]}}, "required": ["y"], "additionalProperties": False}
OPEN_X = {word: value for word, value in X.items() if word != "additionalProperties"}
TREE = {
    "type": "object",
    "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#"}},
    "required": ["v"],
    "additionalProperties": False,
}
# name: (schema, arguments that it allows)
SHAPES = {
    "plain": (X, {"x": True}),
    "no type": ({word: value for word, value in X.items() if word != "type"}, {"x": False}),
    "types": (X | {"type": ["object", "null"]}, {"x": False}),
    "$ref at the root": ({"$ref": "#/$defs/A", "$defs": {"A": X}}, {"x": True}),
    "$ref to a $ref": ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/a~1b"}, "a/b": X}}, {"x": True}),
    "$anchor": ({"$ref": "#here", "$defs": {"A": X | {"$anchor": "here"}}}, {"x": True}),
    "anyOf at the root": ({"anyOf": [X]}, {"x": True}),
    "anyOf of several": ({"anyOf": [X, {"type": "string"}, Y]}, {"y": 2}),
    "oneOf at the root": ({"oneOf": [X, Y]}, {"y": 1}),
    "allOf at the root": ({"type": "object", "allOf": [OPEN_X]}, {"x": True}),
    "allOf of several": ({"allOf": [OPEN_X, {"properties": {"y": {"type": "integer", "maximum": 9}},
                                             "required": ["y"]}]}, {"x": True, "y": 3}),
    "allOf of the same": ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                                     {"properties": {"a": {"minimum": 3, "maximum": 5}}}]}, {"a": 4}),
    "properties beside anyOf": (OPEN_X | {"anyOf": [{"properties": {"y": {"const": 1}}, "required": ["y"]},
                                                    {"properties": {"z": {"const": "a"}}, "required": ["z"]}]},
                                {"x": True, "z": "a"}),
    "free map": ({"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1}, {"any": 3}),
    "free map of strings": ({"type": "object", "additionalProperties": {"type": "string", "maxLength": 5},
                             "minProperties": 1, "maxProperties": 2}, {"any": "word"}),
    "free map of references": ({"type": "object", "additionalProperties": {"$ref": "#/$defs/n"}, "minProperties": 1,
                                "$defs": {"n": {"enum": ["a", "b"]}}}, {"any": "b"}),
    "patternProperties": ({"type": "object", "patternProperties": {"^k": {"type": "integer"}}, "minProperties": 1},
                          {"key": 3}),
    "patternProperties only": ({"type": "object", "minProperties": 1, "additionalProperties": False,
                                "patternProperties": {"^k": {"type": "integer"}, "^s": {"const": 7}}}, {"s": 7}),
    "properties and others": (OPEN_X | {"additionalProperties": {"enum": [1, 2]}, "minProperties": 2},
                              {"x": True, "any": 1}),
    "required beyond properties": ({"type": "object", "properties": {}, "required": ["zz"]}, {"zz": "text"}),
    "required of a map": ({"type": "object", "additionalProperties": {"type": "integer", "maximum": 5},
                           "required": ["zz"]}, {"zz": 3}),
    "required of a pattern": ({"type": "object", "patternProperties": {"^z": {"const": 7}}, "required": ["zz"],
                               "additionalProperties": False}, {"zz": 7}),
    "reference to a property": (X | {"properties": {"x": {"type": "boolean"}, "y": {"$ref": "#/properties/x"}},
                                     "required": ["x", "y"]}, {"x": True, "y": False}),
    "reference to itself": (TREE, {"v": True, "next": {"v": False}}),
    "enum at the root": ({"enum": [3, {"a": 1, "b": "c"}, {}]}, {"a": 1, "b": "c"}),
    "const at the root": ({"const": {"a": [None]}}, {"a": [None]}),
    "strings of several kinds": ({"anyOf": [{"properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"],
                                             "additionalProperties": False},
                                            {"properties": {"a": {"type": "integer", "maximum": 7}}, "required": ["a"],
                                             "additionalProperties": False}]}, {"a": 5}),
    "beside a reference": ({"properties": {"a": {"$ref": "#/$defs/s", "maxLength": 2}}, "required": ["a"],
                            "additionalProperties": False, "$defs": {"s": {"type": "string"}}}, {"a": "bc"}),
    "beside anyOf": ({"properties": {"a": {"type": "string", "anyOf": [{"maxLength": 2}, {"pattern": "^[ab]{3}$"}]}},
                      "required": ["a"], "additionalProperties": False}, {"a": "aba"}),
    "constants of one type": ({"properties": {"a": {"type": "string", "enum": ["b", None, 3]}}, "required": ["a"],
                               "additionalProperties": False}, {"a": "b"}),
    "no parameters": ({"type": "object", "properties": {}, "required": [], "description": "None."}, {}),
    "no schema": ({"properties": {"a": True, "b": False, "c": {"description": "x"}}, "required": ["a", "c"],
                   "additionalProperties": False}, {"a": "text", "c": "text"}),
}  # fmt: skip
FREE_TEXTS = ("required beyond properties", "no schema")  # a random text hardly ever ends


def written(style, name, arguments):
    """A call as a model of a style writes it; in Harmony without <|call|>, which ends the answer."""
    text = json.dumps(arguments)
    if style in (XML, SEED):
        values = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in arguments.items()]
        space = "\n" if style is XML else ""
        members = "".join(f"<parameter={key}>{space}{value}{space}</parameter>\n" for key, value in values)
        return f"{style.begin}\n<function={name}>\n{members}</function>\n{style.end}"
    gemma, function_gemma = in_gemma(arguments, '<|"|>'), in_gemma(arguments, "<escape>")
    return {
        "hermes": f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>',
        "llama": f'{{"name": "{name}", "parameters": {text}}}',
        "mistral": f'[TOOL_CALLS][{{"name": "{name}", "arguments": {text}}}]',
        "mistral_named": f"[TOOL_CALLS]{name}[ARGS]{text}",
        "harmony": f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}",
        "granite": f'<|tool_call|>[{{"name": "{name}", "arguments": {text}}}]',
        "phi": f'<|tool_call|>[{{"name": "{name}", "arguments": {text}}}]<|/tool_call|>',
        "gemma": f"<|tool_call>call:{name}{gemma}<tool_call|>",
        "function_gemma": f"<start_function_call>call:{name}{function_gemma}<end_function_call>",
    }[style.name]


def written_twice(style, first, second):
    """Two calls, as `written` makes them, in one answer."""
    if style.name in ("mistral", "granite", "phi"):
        end = f"]{style.end or ''}"
        return first.removesuffix(end) + ", " + second[second.index('{"name"') :]
    between = {"llama": "; ", "harmony": f"{style.end}<|start|>assistant", "hermes": "\n", "xml": "\n", "seed": "\n"}
    return first + between.get(style.name, "") + second


def in_gemma(value, delimiter):
    """A value in the notation of Gemma's calls."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{in_gemma(each, delimiter)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(in_gemma(each, delimiter) for each in value)}]"
    return f"{delimiter}{value}{delimiter}" if isinstance(value, str) else json.dumps(value)


@BY_STYLE
@pytest.mark.parametrize("name", SHAPES)
def test_calls_under_a_grammar_have_arguments_that_their_schema_allows(name, style):
    schema, _ = SHAPES[name]
    use, complete = ToolUse((Tool("g", "", schema),), must_call=True, parallel=False), 0
    grammar = calls_grammar(style, use)
    for seed in range(3):
        answer = random_answer("byte_level", grammar, np.random.default_rng(seed), most=250)
        if answer is None:  # it did not end in time
            continue
        [(called, arguments)] = parse(parser_of(style, use), list(answer))
        complete += 1
        assert called == "g" and isinstance(json.loads(arguments), dict)
        jsonschema.validate(json.loads(arguments), schema)
    assert complete or style not in (XML, SEED) or name in FREE_TEXTS, "a call that ends is among them"


@BY_STYLE
@pytest.mark.parametrize("name", SHAPES)
def test_a_call_that_the_schema_allows_is_allowed(name, style):
    schema, arguments = SHAPES[name]
    jsonschema.validate(arguments, schema)
    use = ToolUse((Tool("g", "", schema),), must_call=True, parallel=False)
    call = written(style, "g", arguments)
    assert allows("byte_level", calls_grammar(style, use), call)
    [(_, found)] = parse(parser_of(style, use), [call])
    assert json.loads(found) == arguments


@BY_STYLE
@pytest.mark.parametrize("name, wrong", [
    ("no type", {}), ("no type", {"x": True, "y": 1}), ("$ref at the root", {}), ("anyOf of several", {"x": 1}),
    ("allOf of several", {"x": True}), ("allOf of the same", {"a": 6}), ("free map", {}), ("free map", {"any": "a"}),
    ("patternProperties only", {"other": 3}), ("patternProperties only", {"s": 8}),
    ("required beyond properties", {}), ("reference to a property", {"x": True, "y": 1}),
    ("enum at the root", {"a": 1}), ("beside a reference", {"a": "bcd"}), ("required of a pattern", {"zz": 8}),
])  # fmt: skip
def test_a_call_that_the_schema_does_not_allow_is_not_allowed(name, wrong, style):
    schema, _ = SHAPES[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    use = ToolUse((Tool("g", "", schema),), must_call=True, parallel=False)
    assert not allows("byte_level", calls_grammar(style, use), written(style, "g", wrong))


def test_properties_are_counted_in_xml():
    """Only in the XML style: where llguidance writes the object, it cannot count properties that are not required."""
    schema = X | {"properties": {n: {"const": n} for n in "abc"}, "required": [], "minProperties": 2}
    for most in (2, 3):
        grammar = calls_grammar(XML, ToolUse((Tool("g", "", schema | {"maxProperties": most}),), parallel=False))
        found = [
            names
            for names in ("", "a", "ab", "ac", "bc", "abc")
            if allows("byte_level", grammar, written(XML, "g", {name: name for name in names}))
        ]
        assert found == ["ab", "ac", "bc", "abc"][: 3 + most // 3]


@BY_STYLE
def test_a_schema_that_no_object_fits_is_a_value_error(style):
    nothing = {"required": ["a"], "additionalProperties": False}
    with pytest.raises(ValueError, match=r"no object fits|nsatisfiable"):
        GRAMMARS["byte_level"].mask(calls_grammar(style, ToolUse((Tool("g", "", nothing),))))
    with pytest.raises(ValueError, match="expected a schema of type object, got 'string'"):
        Tool("g", "", {"type": "string"})


@pytest.mark.parametrize("key", ["a>b", " a", "a\nb", "x" * 300])
def test_a_parameter_that_cannot_be_written_in_xml(key):
    properties = {"type": "object", "properties": {key: {"type": "string"}, "b": {"const": 1}}}
    grammar = calls_grammar(XML, ToolUse((Tool("g", "", properties),), parallel=False))
    assert allows("byte_level", grammar, written(XML, "g", {"b": 1}))
    with pytest.raises(ValueError, match="cannot be written"):
        calls_grammar(XML, ToolUse((Tool("g", "", properties | {"required": [key]}),)))


ENDING = ["a</parameter>", "</parameter>b", "a\n</parameter>\nb", "</parameter>", "<</parameter>"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"minLength": 1},
        {"maxLength": 80},
        {"pattern": "^[^q]*$"},
        {"pattern": "[ab]|<"},
        {"format": "uri"},
        {"minLength": 2, "maxLength": 60, "pattern": "."},
    ],
    ids=str,
)
def test_no_text_in_xml_has_an_end_in_itself(kind, strict):
    begin = "a:" if "format" in kind else ""
    schema = {"properties": {"v": {"type": "string", **kind}}, "required": ["v"], "additionalProperties": False}
    use = ToolUse((Tool("g", "", schema, strict),), must_call=True, parallel=False)
    grammar = calls_grammar(XML, use)
    for text in ENDING:
        assert not allows("byte_level", grammar, written(XML, "g", {"v": begin + text})), text
    for text in ("a<parameter>", "b</function>", "</tool_call>a", "</paramete>a<", "</</parame</function></tool_call>"):
        call = written(XML, "g", {"v": begin + text})
        assert allows("byte_level", grammar, call)
        [(_, arguments)] = parse(CallParser(XML, use), list(call))
        assert json.loads(arguments) == {"v": begin + text}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("text", ENDING)
def test_a_constant_with_an_end_in_itself_stands_there_as_json(text, strict):
    schema = {"properties": {"v": {"enum": [text, "x"]}}, "required": ["v"], "additionalProperties": False}
    use = ToolUse((Tool("g", "", schema, strict),), must_call=True, parallel=False)
    grammar = calls_grammar(XML, use)
    for seed in range(4):
        answer = random_answer("byte_level", grammar, np.random.default_rng(seed))
        [(_, arguments)] = parse(CallParser(XML, use), list(answer))
        jsonschema.validate(json.loads(arguments), schema)
    for value in (text, "x"):
        call = written(XML, "g", {"v": 0}).replace("0", json.dumps(value))
        assert allows("byte_level", grammar, call)
        [(_, arguments)] = parse(CallParser(XML, use), list(call))
        assert json.loads(arguments) == {"v": value}


def test_a_pattern_that_only_texts_with_an_end_fit():
    schema = {"properties": {"v": {"type": "string", "pattern": "a</parameter>b"}}, "required": ["v"]}
    with pytest.raises(ValueError, match="parameters of g: no text that can stand in this model's calls fits"):
        calls_grammar(XML, ToolUse((Tool("g", "", schema, strict=True),)))
    grammar = calls_grammar(XML, ToolUse((Tool("g", "", schema),), parallel=False))
    assert allows("byte_level", grammar, written(XML, "g", {"v": "any"}))


def doubled(levels):
    return {"anyOf": [doubled(levels - 1)] * 2} if levels else X


@pytest.mark.parametrize("schema, message", [
    ({"anyOf": [{"properties": {f"p{i}": {}}} for i in range(MAX_SHAPES + 1)]}, "at most 64 kinds"),
    (doubled(8), "at most 64 kinds|put together"),
    ({"allOf": [{"properties": {f"p{i}": {}}} for i in range(2000)]}, "put together"),
    ({"$ref": "#/$defs/none"}, "leads to no schema"),
    ({"$ref": "http://127.0.0.1/x"}, "leads to no schema"),
    ({"properties": {f"p{i}": {"$ref": "#/$defs/all"} for i in range(3000)},
      "$defs": {"all": {"type": "array", "prefixItems": [{"const": i} for i in range(3000)]}}}, "more than 262144"),
    ({"properties": {f"p{i}": {} for i in range(100)}, "maxProperties": 50}, "at most 500 counts"),
])  # fmt: skip
def test_schemas_that_take_too_much_are_value_errors(schema, message):
    with pytest.raises(ValueError, match=message):
        calls_grammar(XML, ToolUse((Tool("g", "", schema),)))


def test_a_schema_that_contains_itself_ends():
    around = {"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, X]}}}
    assert Shape() in shapes(around)


def test_patterns_are_found_in_linear_time():
    assert matches("^k", "key") and matches("b|^c", "abc") and not matches("^k", "a key")
    assert not matches("(?=k)", "key"), "one that cannot be enforced"
    assert not matches("^(x+x+)+y$", "x" * 200)


REPAIRED = [
    ('{"a": 1,}', {"a": 1}),
    ('{"a": [1, 2, ], }', {"a": [1, 2]}),
    ('{"a": "b\nc\td"}', {"a": "b\nc\td"}),
    ("{'a': 'it\"s'}", {"a": 'it"s'}),
    ('{"a": None, "b": True, "c": NaN, "d": -Infinity}', {"a": None, "b": True, "c": None, "d": None}),
    ('{"a": "b" "c": 2}', {"a": "b", "c": 2}),
    ('{"a": , "b": }', {"a": None, "b": None}),
    ('{a: Paris, "b": 007, "c": .5, "d": +3}', {"a": "Paris", "b": "007", "c": 0.5, "d": 3}),
    ('{"a": [1, {"b": 2}, "c": 3}', {"a": [1, {"b": 2}, "c", 3]}),
    ('{"a": "\\d\\u12 \\\'"}', {"a": "\\d\\u12 '"}),
    ('{"a": ["b"}', {"a": ["b"]}),
    ('{,,"a": 1,,"b": 2]}', {"a": 1, "b": 2}),
    ('{"a"}', {"a": None}),
    ('{"a": -1.5e3, "b": "\\u00e9é", "c": {}, "d": []}', {"a": -1500.0, "b": "éé", "c": {}, "d": []}),
    ('{"a": "\x01\x7f"}', {"a": "\x01\x7f"}),
    ('{"a":\u00a01}', {"a": 1}),
]  # fmt: skip


@BY_STYLE
@pytest.mark.parametrize("text, value", REPAIRED, ids=range(len(REPAIRED)))
def test_arguments_that_are_no_json_are_repaired(text, value, style):
    if style in (XML, SEED):
        call = f"{style.begin}<function=f><parameter=v>\n{text}\n</parameter></function>{style.end}"
        use, value = ToolUse((Tool("f", "", {"properties": {"v": {"type": "object"}}}),)), {"v": value}
    else:
        call, use = written(style, "f", {}).replace("{}", text), ToolUse((Tool("f", "", {}),))
    for pieces in ([call], list(call)):
        [(_, arguments)] = parse(parser_of(style, use), pieces)
        assert json.loads(arguments) == value


@pytest.mark.parametrize("given, arguments", [
    ("null", "{}"), ("None ", "{}"), ('""', "{}"), ('"null"', "{}"), ('"{\\"a\\": 1,}"', '{"a": 1}'), ("{}", "{}"),
    ('"text"', None), ('"[1]"', None), ("3", None), ("[1]", None), ("true", None), ('"{"', None),
])  # fmt: skip
def test_arguments_that_are_no_object_are_none_or_the_call_stays_text(given, arguments):
    for order in ('{{"name": "f", "arguments": {}}}', '{{"arguments": {}, "name": "f"}}'):
        call = f"<tool_call>\n{order.format(given)}\n</tool_call>"
        for pieces in ([call], list(call)):
            found = parse(CallParser(STYLES[0], ToolUse((Tool("f", "", {}),))), pieces)
            assert found == ([call] if arguments is None else [("f", arguments)])


@pytest.mark.parametrize("value", ["NaN", "1e999", "[NaN]", "[1", "{'a'", "x]"])
def test_values_in_xml_that_are_no_json_are_texts(value):
    use = ToolUse((Tool("f", "", {"properties": {"v": {"type": ["number", "array"]}}}),))
    call = f"<tool_call><function=f><parameter=v>\n{value}\n</parameter></function></tool_call>"
    [(_, arguments)] = parse(CallParser(XML, use), [call])
    assert json.loads(arguments, parse_constant=pytest.fail)["v"] in (value, [None])


def test_a_mark_inside_of_a_string_in_json_is_a_part_of_it():
    use = ToolUse((Tool("f", "", {"properties": {"v": {"type": "array"}, "w": {}}}),))
    value = ["a</parameter>\\", '"</parameter>', {"k": "</function>"}]
    call = written(XML, "f", {"v": value, "w": '"</'})
    for pieces in ([call], list(call)):
        [(_, arguments)] = parse(CallParser(XML, use), pieces)
        assert json.loads(arguments) == {"v": value, "w": '"</'}


@BY_STYLE
def test_a_call_that_is_cut_off_in_its_marks_leaves_nothing_in_the_text(style):
    use = ToolUse((Tool("f", "", {}),))
    call = written(style, "f", {"a": 1})
    whole, told = written_twice(style, call, call), None
    for end in range(len(whole)):
        events = (parser := parser_of(style, use)).push(whole[:end]) + parser.finish()
        begun = any(isinstance(event, CallStart) for event in events)
        told = told or (end if begun else None)
        if told:
            assert all(isinstance(event, (CallStart, Arguments)) for event in events), whole[:end]
    assert told


def test_a_call_without_its_last_bracket():
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>\n<tool_call>\n{"name": "f"}</tool_call> So.'
    for pieces in ([text], list(text)):
        assert parse(CallParser(STYLES[0], ToolUse((Tool("f", "", {}),))), pieces) == [
            ("f", '{"a": 1}'),
            ("f", "{}"),
            "So.",
        ]
