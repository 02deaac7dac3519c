"""Gemma's, Mistral's, Granite's and Phi-4-mini's own marks: answers, prompts, grammars and what ends an answer."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.text import reasoning
from lockstep.text.conversation import Conversation
from lockstep.text.reasoning import PlainParser, ThoughtParser, marks_of
from lockstep.text.tokenizer.end_mark import end_mark, with_call_ends
from lockstep.text.tool_calls import styles
from lockstep.text.tool_calls.events import Reasoning
from lockstep.text.tool_calls.parser import CallParser
from lockstep.text.tool_calls.styles import style_of
from lockstep.text.tool_calls.tools import Tool, ToolUse
from tests.text import families
from tests.text.calls import CITY, TOOLS, USE, WEATHER, parse, ways_to_cut
from tests.text.families import Family

GEMMA_MARKS = (
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    '<|"|>',
)
FUNCTION_MARKS = (
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<escape>",
    "<end_of_turn>",
)
MISTRAL_MARKS = ("</s>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]")
SEED_MARKS = ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>")
FAMILIES = {
    "gemma": Family(families.GEMMA, GEMMA_MARKS, styles.GEMMA, reasoning.GEMMA),
    "function_gemma": Family(families.FUNCTION_GEMMA, FUNCTION_MARKS, styles.FUNCTION_GEMMA, None),
    "mistral": Family(families.MISTRAL, MISTRAL_MARKS, styles.MISTRAL_NAMED, reasoning.MISTRAL),
    "seed": Family(families.SEED, ("<seed:eos>", *SEED_MARKS), styles.SEED, reasoning.SEED),
    "granite": Family(families.GRANITE, ("<|end_of_text|>", "<|tool_call|>"), styles.GRANITE, reasoning.GRANITE),
    "phi": Family(families.PHI, ("<|end|>", "<|tool_call|>", "<|/tool_call|>"), styles.PHI, None),
}
BY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
MODELS = {name: family.model() for name, family in FAMILIES.items()}
USER = [dict(role="user", content="hello")]
THINKS = dict(gemma=dict(enable_thinking=True), granite=dict(thinking=True))  # variables that switch thoughts on
WEATHER_CALL, NOW_CALL = ("get_weather", CITY), ("now", "{}")
GEMMAS_CALL = ("get_weather", '{"city":"Paris"}')
GEMMA_CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
SEED_CALL = (
    "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>"
)
LISTED = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
ANSWERS = [
    ("gemma", "<|channel>thought\nHm, a < b.\n<channel|>Yes.", [Reasoning("Hm, a < b."), "Yes."]),
    ("gemma", "<|channel>thought\n<channel|>Yes.", ["Yes."]),
    ("gemma", f"<|channel>thought\nI look.<channel|>{GEMMA_CALL}", [Reasoning("I look."), GEMMAS_CALL]),
    ("gemma", f"{GEMMA_CALL}<|tool_call>call:now{{}}<tool_call|><|tool_response>", [GEMMAS_CALL, NOW_CALL]),
    ("gemma", f"I look.\n{GEMMA_CALL}", ["I look.", GEMMAS_CALL]),
    ("gemma", '<|tool_call>call:f{a:<|"|>q"\\\n{<tool_call|><channel|><|"|>,b:[1,true,{c:null}],d:-1.5e-3}<tool_call|>',
     [("f", '{"a":"q\\"\\\\\\n{<tool_call|><channel|>","b":[1,true,{"c":null}],"d":-1.5e-3}')]),
    ("gemma", 'Well.<|channel>thought\nMore.<channel|>Yes.<channel|>', ["Well.", Reasoning("More."), "Yes."]),
    ("gemma", '<|channel>thought\nI look.<channel|>call:now{}<tool_call|>', [Reasoning("I look."), NOW_CALL]),
    ("gemma", '<|tool_call>call:f{a:"x",b: <|"|>y<|"|>}<tool_call|>', [("f", '{"a":"x","b": "y"}')]),
    ("gemma", '<|tool_call>call:f{a:Paris,b:None,<|"|>c d<|"|>:1', [("f", '{"a":"Paris","b":null,"c d":1}')]),
    ("gemma", '<|tool_call>call:f{a:<|"|>x <|', [("f", '{"a":"x "}')]),
    ("gemma", "call: 911 {or} 112", ["call: 911 {or} 112"]),
    ("gemma", "<|tool_call>none of it<tool_call|>.", ["<|tool_call>none of it<tool_call|>."]),
    ("gemma", "<|channel>thou", []),
    ("function_gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
                       "<start_function_call>call:now{}<end_function_call>", [GEMMAS_CALL, NOW_CALL]),
    ("mistral", "[THINK]Hm [ok].[/THINK]\nYes.", [Reasoning("Hm [ok]."), "Yes."]),
    ("mistral", f"[THINK]I look.[/THINK][TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}",
     [Reasoning("I look."), WEATHER_CALL, NOW_CALL]),
    ("mistral", "No [THINK]thought[/THINK].", ["No [THINK]thought[/THINK]."]),
    ("seed", f"<seed:think>Hm.</seed:think>So:\n{SEED_CALL}", [Reasoning("Hm."), "So:", WEATHER_CALL]),
    ("granite", f'<|tool_call|>[{LISTED}, {{"name": "now", "arguments": {{}}}}]', [WEATHER_CALL, NOW_CALL]),
    ("granite", f"<|tool_call|>{LISTED}", [WEATHER_CALL]),
    ("granite", "<think>Hm.</think>\n<response>Yes, <b>.</response>", [Reasoning("Hm."), "Yes, <b>."]),
    ("granite", f"<think>Hm.</think><response>I look.\n<|tool_call|>[{LISTED}]</response>",
     [Reasoning("Hm."), "I look.", WEATHER_CALL]),
    ("granite", '<think>Hm.</think><response><|tool_call|>[{"name": "f", "arguments": {"a": "</response>"}}]',
     [Reasoning("Hm."), ("f", '{"a": "</response>"}')]),
    ("granite", "<think>Hm.</think><respond", [Reasoning("Hm."), "<respond"]),
    ("phi", f'<|tool_call|>[{LISTED}, {{"name": "now", "arguments": {{}}}}]<|/tool_call|>', [WEATHER_CALL, NOW_CALL]),
    ("phi", f"<|tool_call|>{LISTED}<|/tool_call|><|tool_call|>[{LISTED}]<|/tool_call|>", [WEATHER_CALL, WEATHER_CALL]),
    ("phi", f"So:\n<|tool_call|>[{LISTED}<|/tool_call|> Done.", ["So:", WEATHER_CALL, "Done."]),
    ("phi", "<|tool_call|>[1]<|/tool_call|>", ["<|tool_call|>[1]<|/tool_call|>"]),
]  # fmt: skip


@pytest.mark.parametrize("name, text, expected", ANSWERS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(ANSWERS)])
def test_answers_are_read_the_same_however_they_are_cut(name, text, expected):
    _, chat = MODELS[name]
    prepared = chat.prepare(Conversation(USER, USE, variables=THINKS.get(name, {})))
    assert prepared.options["skip_special_tokens"] is False
    for pieces in ways_to_cut(text):
        assert parse(prepared.new_parser(), pieces) == expected, pieces


TEXTS = (
    "<|channel>",
    "<channel|>",
    "thought",
    "\n",
    "<|tool_call>",
    "call:now{",
    'a:<|"|>',
    '<|"|>',
    "}",
    "<tool_call|>",
    "x",
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), max_size=12), st.booleans(), st.booleans())
def test_any_text_of_marks_is_read_the_same_however_it_is_cut(fragments, opened, is_cut):
    text = "".join(fragments)
    new = lambda: ThoughtParser(CallParser(styles.GEMMA, USE), opened, reasoning.GEMMA)
    assert parse(new(), [text], is_cut) == parse(new(), list(text), is_cut) == parse(new(), fragments, is_cut)


@pytest.mark.parametrize("marks", reasoning.MARKS, ids=lambda marks: f"{marks.open}{marks.answer or ''}")
def test_thoughts_of_every_family(marks):
    label = f"{marks.label}\n" if marks.label else ""
    text = f"{marks.open}{label} A thought.\n{marks.close}\n\nText."
    assert marks_of(text + "".join(marks.answer or ())) is marks
    for pieces in ways_to_cut(text):
        assert parse(ThoughtParser(PlainParser(), False, marks), pieces) == [Reasoning("A thought."), "Text."]
    assert marks.is_closed(text.removesuffix("Text.")) and marks.is_open(marks.open + label)
    assert marks.is_open(f"{marks.open}{label}{marks.inside}\n")
    for pieces in ways_to_cut("Hm." + marks.close + "Text."):
        assert parse(ThoughtParser(PlainParser(), True, marks), pieces) == [Reasoning("Hm."), "Text."]


# ------------------------------------------------------------ prompts


@BY_FAMILY
def test_what_is_seen_in_a_template(name):
    family, (_, chat) = FAMILIES[name], MODELS[name]
    assert style_of(family.template) is chat.style is family.style and marks_of(family.template) is family.marks


CALLED = [
    *USER,
    dict(
        role="assistant",
        content="",
        reasoning_content="I look.",
        tool_calls=[dict(id="call_1", type="function", function=dict(name="get_weather", arguments=dict(city="Rome")))],
    ),
    dict(role="tool", tool_call_id="call_1", content="sun"),
]
SHOWN = {
    "gemma": ['<|channel>thought\nI look.<channel|><|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'],
    "function_gemma": ["<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>"],
    "mistral": ["[THINK]I look.[/THINK][TOOL_CALLS]get_weather[CALL_ID]", '[ARGS]{"city": "Rome"}</s>'],
    "seed": ["<seed:think>I look.</seed:think>\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</par"],
    "granite": ['<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|end_of_text|>'],
    "phi": ['<|tool|>[{"name": "get_weather", ',
            '<|assistant|><|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|><|end|>'],
}  # fmt: skip


@BY_FAMILY
def test_earlier_calls_stand_in_the_prompt_as_the_model_writes_them(name):
    _, chat = MODELS[name]
    for system in ([], [dict(role="system", content="Be brief.")]):
        prompt = chat.prompt(Conversation([*system, *CALLED], USE))
        assert all(text in prompt for text in SHOWN[name]) and "sun" in prompt and re.search('[">]now["<]', prompt)
        assert ("Be brief." in prompt) == bool(system) and "You can call functions" not in prompt


def test_the_beginning_of_an_answer_with_a_thought():
    _, chat = MODELS["mistral"]
    begun = [*USER, dict(role="assistant", content="Well, ", reasoning_content="Hm.")]
    assert chat.prompt(Conversation(begun, continues=True)) == "[INST]hello[/INST][THINK]Hm.[/THINK]Well, "


# ------------------------------------------------------------ grammars


def accepts(name, mask, text):
    """Whether a mask allows all tokens of a text, and then its end."""
    ids = MODELS[name][0].encode(text, add_special_tokens=False)
    for at, token_id in enumerate([*ids, 0]):
        words = mask(ids[:at])
        if words is not None and not words[token_id // 32] >> (token_id % 32) & 1:
            return False
    return True


def mask_of(name, use, **variables):
    chat = MODELS[name][1]
    return chat.prepare(Conversation(USER, use, variables=variables)).options["logits_mask"]


HELD = {
    "gemma": GEMMA_CALL,
    "function_gemma": "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{CITY}",
    "seed": SEED_CALL,
    "granite": f"<|tool_call|>[{LISTED}]",
    "phi": f"<|tool_call|>[{LISTED}]<|/tool_call|>",
}


def call_of_now(name):
    call = re.sub("<parameter=.*\n|{[^{}]*}(?=[^}]*$|}])", lambda found: "{}" * (found[0][0] == "{"), HELD[name])
    return call.replace("get_weather", "now")


@BY_FAMILY
@pytest.mark.parametrize("strict", [False, True])
def test_a_call_that_must_come(name, strict):
    """Of any function, or of a named one alone."""
    call, weather = HELD[name], Tool(WEATHER.name, "", WEATHER.parameters, strict)
    mask = mask_of(name, ToolUse((weather, TOOLS[1]), must_call=True, allowed=("get_weather",) if strict else None))
    now = call_of_now(name)
    assert accepts(name, mask, call) and accepts(name, mask, now) != strict
    for other in ("No.", call.replace("city", "town"), call.replace("Paris", "Reykjavik"), call[: len(call) // 2]):
        assert not accepts(name, mask, other), other


@BY_FAMILY
@pytest.mark.parametrize("parallel", [False, True])
def test_several_calls_that_must_come(name, parallel):
    call = call_of_now(name)
    listed, now = '{"name": "now", "arguments": {}}', ToolUse((TOOLS[1],), must_call=True, parallel=parallel)
    several = call.replace(listed, f"{listed}, {listed}") if listed in call else call + "\n" * (name == "seed") + call
    assert accepts(name, mask_of(name, now), several) == parallel


@BY_FAMILY
def test_a_free_answer_is_held_to_the_tools_once_it_calls(name):
    call = HELD[name]
    for text, is_good in (("Free text.", True), (f"So: {call}", True), (call.replace("city", "town"), False)):
        assert accepts(name, mask_of(name, USE), text) == is_good, text


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name, thought", [
    ("gemma", "<|channel>thought\nI write <|tool_call> first.<channel|>"),
    ("mistral", "[THINK]First [TOOL_CALLS].[/THINK]"),
    ("seed", "<seed:think>First <seed:tool_call>.</seed:think>"),
])  # fmt: skip
def test_a_mark_within_a_thought_begins_no_call(name, thought, parallel):
    mask = lambda: mask_of(name, ToolUse(TOOLS, parallel=parallel), **THINKS.get(name, {}))
    assert accepts(name, mask(), thought + HELD[name]) and accepts(name, mask(), thought + "So no.")
    assert not accepts(name, mask(), thought + HELD[name].replace("city", "town"))


@pytest.mark.parametrize("name, thought", [
    ("gemma", "<|channel>thought\nHm.<channel|>"), ("mistral", "[THINK]Hm.[/THINK]"),
    ("granite", "<think>Hm.</think>\n<response>"),
])  # fmt: skip
def test_a_thought_before_a_call_that_must_come(name, thought):
    mask = lambda: mask_of(name, ToolUse(TOOLS, must_call=True), **THINKS.get(name, {}))
    assert accepts(name, mask(), thought + HELD[name]) and accepts(name, mask(), HELD[name])
    assert not accepts(name, mask(), thought + "No.")


def test_no_thought_where_the_prompt_has_closed_one():
    mask = mask_of("gemma", ToolUse(TOOLS, must_call=True))
    assert not accepts("gemma", mask, "<|channel>thought\nHm.<channel|>" + GEMMA_CALL)


@pytest.mark.parametrize("schema, good, bad", [
    ({"type": "array", "items": {"enum": ["a", 2]}, "minItems": 1, "maxItems": 2},
     [["a"], [2, "a"]], [[], ["b"], [2] * 3]),
    ({"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False},
     [[], ["x"], ["x", None]], [[None], ["x", None, 1]]),
    ({"type": "array", "prefixItems": [{"const": 1}], "minItems": 2}, [[1, {"k": ["x"]}], [1, 2, 3]], [[1], [2, 1]]),
    ({"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}, "b": {}}},
     [{"a": "xy"}, {"b": [None, {"k": True}]}, {"a": "", "b": -1.5}, {}], [{"a": "xyz"}, {"c": 1}]),
    ({"type": ["integer", "string"], "maximum": 3, "pattern": "^x"}, [3, "xy"], [4, "y", 1.5, None]),
    ({"maximum": 3}, [3, "text", None, [4]], [4]),
    ({"allOf": [{"type": "integer"}, {"minimum": 2}, {"minimum": 4}]}, [4], [3, "4"]),
    ({"enum": ["q\"\\\n", '<|"|>', {"k": ['a"b']}]}, ["q\"\\\n", {"k": ['a"b']}], ['<|"|>', "q"]),
    ({"$ref": "#/properties/v/anyOf/1", "anyOf": [{"const": 1}, {"type": "boolean"}]}, [True], [1]),
    ({"properties": {"a b": {"const": "x:y"}}, "type": "object", "required": ["a b"]},
     [{"a b": "x:y"}], [{"a": "x:y"}]),
])  # fmt: skip
def test_values_of_every_schema_in_gemmas_notation(schema, good, bad):
    tool = Tool("g", "", {"type": "object", "properties": {"v": schema}, "required": ["v"]}, strict=True)
    write = lambda value: styles.GEMMA.write([{"name": "g", "arguments": {"v": value}}])
    mask = mask_of("gemma", ToolUse((tool,), must_call=True))
    assert [value for value in good + bad if accepts("gemma", mask, write(value))] == good
    for value in good:
        [(_, arguments)] = parse(CallParser(styles.GEMMA, USE), list(write(value)))
        assert json.loads(arguments) == {"v": value}


@pytest.mark.parametrize("schema, message", [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"type": "array", "contains": {}}, "contains"),
    ({"type": "object", "propertyNames": {"maxLength": 1}}, "propertyNames"), ({"$ref": "#/nowhere"}, "does not exist"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "allOf: cannot"),
    ({"type": "array", "items": [{}]}, "one schema"),
    ({"type": "array", "items": False, "minItems": 1}, "nsatisfiable"), ({"enum": ['<|"|>']}, "no value"),
    ({"type": "object", "required": ['<|"|>']}, "cannot be written"),
])  # fmt: skip
def test_a_strict_schema_that_cannot_be_enforced_in_gemmas_notation(schema, message):
    tool = lambda strict: Tool("g", "", {"type": "object", "properties": {"v": schema}, "required": ["v"]}, strict)
    with pytest.raises(ValueError, match=f"tools: parameters of g.*{message}"):
        mask_of("gemma", ToolUse((tool(True),), must_call=True))
    loose = mask_of("gemma", ToolUse((tool(False),), must_call=True))
    assert accepts("gemma", loose, '<|tool_call>call:g{v:[<|"|>a<|"|>]}<tool_call|>') or schema.get("type") == "object"


# ------------------------------------------------------------ ends


@pytest.mark.parametrize("name, ends", [
    ("gemma", {"<turn|>", "<|tool_response>"}), ("function_gemma", {"<end_of_turn>", "<start_function_response>"}),
    ("mistral", {"</s>"}), ("seed", {"<seed:eos>"}), ("granite", {"<|end_of_text|>"}), ("phi", set()),
])  # fmt: skip
def test_what_ends_an_answer(name, ends):
    tokenizer, _ = MODELS[name]
    ids = with_call_ends(tokenizer) | {end_mark(tokenizer)}
    assert {tokenizer.backend.id_to_token(token_id) for token_id in ids} == {"<|end|>", *ends}
