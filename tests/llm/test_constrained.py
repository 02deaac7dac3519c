"""Constrained decoding and tool calls by `LLM`: the same masks and the same reading of the answer as the server's."""

import json
import pathlib
from dataclasses import replace

import pytest

from lockstep import LLM, SamplingParams
from lockstep.completion import Completion, ToolCall, parse_answer
from lockstep.constrained import conversation, grammar_of
from lockstep.text.grammars import structured
from lockstep.text.tool_calls.events import Arguments, CallStart, Content, Reasoning

WEATHER = dict(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
ASKED = [dict(role="user", content="Is it warm in Rome?")]
SHORT = SamplingParams(max_tokens=64)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, max_context=512) as made:
        yield made


def test_a_schema_holds_every_sample(llm):
    schema = dict(type="object", properties=dict(kind=dict(enum=["a", "b"])), required=["kind"])
    schema |= dict(additionalProperties=False)
    params = SamplingParams(max_tokens=64, temperature=1.0, seed=3, n=3)
    for given in (schema, json.dumps(schema)):
        [answer] = llm.generate("{", params, schema=given)
        assert len(answer.samples) == 3
        assert all(json.loads(sample.text)["kind"] in "ab" for sample in answer.samples)


def test_every_prompt_is_held_to_the_pattern(llm):
    answers = llm.generate(["x = ", "def f(", "# "], SHORT, regex="[0-9]{3}-[a-f]")
    assert all(len(a.text) == 5 and a.text[3] == "-" and a.finish_reason == "stop" for a in answers)


@pytest.mark.parametrize("grammar", ['start: "yes" | "no"', 'root ::= "yes" | "no"'])
def test_grammars_are_lark_or_gbnf(llm, grammar):
    assert llm.generate("x", SHORT, grammar=grammar)[0].text in ("yes", "no")
    assert llm.chat(ASKED, SHORT, grammar=grammar).content in ("yes", "no")


def test_a_required_call_is_made_and_read(llm):
    answer = llm.chat(ASKED, SHORT, tools=[WEATHER], tool_choice="required")
    call = answer.tool_calls[0]
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    assert call.arguments in answer.text and answer.content == ""
    talk = [*ASKED, answer.as_message(), dict(role="tool", tool_call_id=call.id, content="21 degrees")]
    assert llm.chat(talk, SamplingParams(max_tokens=4), tools=[WEATHER]).token_ids


def test_a_tool_is_chosen_by_its_name(llm):
    other = dict(type="function", function=dict(name="time", description="Now."))
    answer = llm.chat(ASKED, SHORT, tools=[WEATHER, other], tool_choice="time")
    assert [call.name for call in answer.tool_calls] == ["time"]


def test_tools_that_may_not_be_called_change_nothing(llm):
    free = llm.chat(ASKED, SHORT)
    assert llm.chat(ASKED, SHORT, tools=[WEATHER], tool_choice="none").token_ids == free.token_ids
    assert free.content == free.text and not free.tool_calls


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(schema={}, regex="a"), "at most one of schema, regex and grammar, got schema and regex"),
        (dict(schema="{"), r"schema: expected a JSON schema or its text, got '\{'"),
        (dict(schema=[1]), "schema: JSON schema: expected an object"),
        (dict(regex="("), "regex: "),
        (dict(regex=3), "regex: .*expected a text, got 3"),
        (dict(grammar="start: missing"), "grammar: "),
    ],
)
def test_a_form_that_cannot_be_is_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.generate("x", SHORT, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tools=["weather"]), r"tools\[0\]: expected \{\"type\": \"function\""),
        (dict(tools=[dict(WEATHER, name="not a name")]), "tools: a name has 1 to 128 letters"),
        (dict(tools=[WEATHER], tool_choice="rain"), "tool_choice: there is no tool 'rain'"),
        (dict(tools=[WEATHER], tool_choice=1), "tool_choice: expected auto, required, none or the name of a tool"),
        (dict(tools=5), "tools: expected a list of functions"),
        (dict(tools=WEATHER), "tools: expected a list of functions"),
        (dict(tools=[WEATHER], tool_choice="required", regex="a"), "regex: the answer has to be a tool call"),
        (dict(tool_choice="required"), "tool_choice: a call is required, but there are no tools"),
    ],
)
def test_tools_that_cannot_be_are_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(ASKED, SHORT, **options)


@pytest.mark.parametrize(
    "call",
    [
        dict(id="a", function=dict(name="weather", arguments="{")),
        dict(id="a", function=dict(name="weather", arguments="[1]")),
        dict(id="a", function=dict(arguments="{}")),
        dict(function=dict(name="weather", arguments="{}")),
        "weather",
    ],
)
def test_a_call_that_was_written_wrongly_is_refused(llm, call):
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]: expected"):
        llm.chat([*ASKED, dict(role="assistant", content=None, tool_calls=[call])], SHORT, tools=[WEATHER])


@pytest.mark.parametrize(
    "messages, message",
    [
        ("hello", "messages must be a list"),
        (ASKED[0], "messages must be a list"),
        (None, "messages must be a list"),
        ([dict(content="x")], "message 0 must be an object with a role"),
        ([dict(role="user", content=5)], r"messages\[0\]\.content: expected a text"),
        ([dict(role="user", content=[dict(type="image_url")])], r"messages\[0\]\.content\[0\]: expected"),
        ([dict(role="assistant", tool_calls=5)], r"messages\[0\]\.tool_calls: expected a list"),
    ],
)
def test_messages_that_cannot_be_are_refused(llm, messages, message):
    for options in (dict(), dict(tools=[WEATHER])):
        with pytest.raises(ValueError, match=message):
            llm.chat(messages, SHORT, **options)


def test_content_may_be_a_list_of_texts(llm):
    parts = [dict(role="user", content=[dict(type="text", text="Is it"), dict(type="text", text="warm?")])]
    whole = [dict(role="user", content="Is it\nwarm?")]
    assert llm.chat(parts, SHORT).token_ids == llm.chat(whole, SHORT).token_ids


@pytest.mark.parametrize("name", ["max_tokens", "add_generation_prompt", "seed"])
def test_what_is_no_variable_of_the_template_is_refused(llm, name):
    with pytest.raises(ValueError, match=f"{name}: this is no variable of the chat template"):
        llm.chat(ASKED, SHORT, **{name: 1})


@pytest.mark.parametrize("params", [3, {}, "x"])
def test_params_that_are_none_are_refused(llm, params):
    with pytest.raises(ValueError, match="params: expected SamplingParams"):
        llm.chat(ASKED, params, regex="a")
    with pytest.raises(ValueError, match="params: expected SamplingParams"):
        llm.generate("x", [params], regex="a")


def test_a_mask_of_ones_own_and_a_form_are_refused_together(llm):
    params = SamplingParams(max_tokens=4, logits_mask=lambda ids: None)
    with pytest.raises(ValueError, match="regex: the params have a logits_mask already"):
        llm.generate("x", params, regex="a")
    with pytest.raises(ValueError, match="tools: the params have a logits_mask already"):
        llm.chat(ASKED, params, tools=[WEATHER])


class Events:
    """A parser that finds what it is told to."""

    def __init__(self, *events):
        self.events = list(events)

    def push(self, text):
        return self.events

    def finish(self, is_cut=False):
        return []


def test_an_answer_is_taken_apart():
    answer = Completion("text", [1], [0.0], "stop", [2])
    parts = [Reasoning("well"), Content("I "), CallStart(0, "id", "f"), Arguments(0, '{"a"'), Arguments(0, ":1}")]
    made = parse_answer(answer, lambda: Events(*parts, Content("ask")))
    assert (made.text, made.reasoning, made.content) == ("text", "well", "I ask")
    assert made.tool_calls == [ToolCall("id", "f", '{"a":1}')] and made.finish_reason == "tool_calls"
    assert made.as_message()["tool_calls"][0]["function"] == dict(name="f", arguments='{"a":1}')
    unfinished = parse_answer(answer, lambda: Events(*parts, CallStart(1, "other", "f"), Arguments(1, '{"a')))
    assert unfinished.tool_calls == made.tool_calls
    cut = parse_answer(answer, lambda: Events(CallStart(0, "id", "f"), Arguments(0, "{", True)))
    assert cut.tool_calls == [] and cut.content == "" and cut.finish_reason == "stop"


def test_nothing_is_asked_for():
    assert grammar_of() is None
    made = conversation(ASKED, None, "auto", None, {})
    assert made.grammar is None and not made.tools.tools and made.messages == ASKED


def test_a_grammar_is_compiled_once_for_a_batch_and_again_as_each_answer_begins(llm, monkeypatch):
    compiled, begun, new_matcher, start = [], [], structured.new_matcher, llm.start_samples
    monkeypatch.setattr(structured, "new_matcher", lambda *given: compiled.append(given) or new_matcher(*given))
    counted = lambda *given, **some: begun.append(len(compiled)) or start(*given, **some)
    monkeypatch.setattr(llm, "start_samples", counted)
    params = [replace(SHORT, seed=i, temperature=1.0, n=1 + i % 2) for i in range(6)]
    answers = llm.generate(["x = "] * 6, params, regex="[0-9]{2}")
    assert begun == [1] * 6 and len(compiled) == sum(each.n for each in params)
    assert all(len(sample.text) == 2 for answer in answers for sample in answer.samples)
    assert [llm.generate("x = ", each, regex="[0-9]{2}")[0] for each in params] == answers


def test_a_schema_that_cannot_be_enforced_is_warned_about_once_or_refused(llm, caplog):
    given = dict(WEATHER, name="odd", parameters=dict(type="object", dependentSchemas=dict(a=dict(type="object"))))
    for _ in range(2):
        answer = llm.chat(ASKED, SHORT, tools=[WEATHER, given], tool_choice="odd")
        assert '"odd"' in answer.text
    assert [record.message for record in caplog.records] == [
        'tools: the parameters of odd are not enforced in full: Unimplemented keys: ["dependentSchemas"]'
    ]
    with pytest.raises(ValueError, match="tools: parameters of odd: "):
        llm.chat(ASKED, SHORT, tools=[dict(given, strict=True)], tool_choice="odd")


def test_the_prompt_of_a_conversation_is_that_of_its_answer(llm):
    talk = [*ASKED, dict(role="assistant", content="I ask.", tool_calls=[ToolCall("abcdefghi", "weather", "{}")])]
    talk += [dict(role="tool", tool_call_id="abcdefghi", content="21 degrees")]
    for options in (dict(), dict(tools=[WEATHER])):
        assert llm.chat_prompt(talk, **options) == llm.chat(talk, SHORT, **options).prompt_token_ids


def test_the_processes_end_with_the_llm():
    before = children()
    with LLM(threads=1, max_context=256) as llm:
        llm.chat(ASKED, SamplingParams(max_tokens=4), regex="a")
        assert len(children() - before) == 2  # one for templates, one for grammars
    assert children() <= before


def children():
    """The ids of this process's child processes."""
    tasks = pathlib.Path("/proc/self/task").glob("*/children")
    return {process_id for task in tasks for process_id in task.read_text().split()}
