"""/v1/responses with OpenAI's own client."""

import json

import httpx
import jsonschema
import openai
import pytest

from tests.serve.chatting import HELLO, PLOT, POINT, saying

TOOLS = [dict(type="function", **PLOT), dict(type="web_search"), dict(type="custom", name="apply_patch")]
SAID = 'I think.\n</think>\n\nSo:\n<tool_call>\n{"name": "plot", "arguments": {"x": 3, "side": "left"}}\n</tool_call>'
THINK = dict(chat_template_kwargs=dict(enable_thinking=True))


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120)


def ask(server, **options):
    return client_of(server).responses.create(
        **dict(model="lockstep", input="hello", max_output_tokens=24, temperature=0) | options
    )


def events_of(server, **options):
    made = list(ask(server, stream=True, **options))
    assert [event.sequence_number for event in made] == list(range(len(made)))
    return made


def without_ids(response):
    """A response without its ids and times, which differ between equal requests."""
    made = response.model_dump()
    for name in ("id", "created_at", "completed_at"):
        made.pop(name, None)
    for item in made["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return made


def test_an_answer_whole_and_streamed(server):
    whole, events = ask(server, max_output_tokens=20), events_of(server, max_output_tokens=20)
    assert whole.output_text and whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens" and whole.usage.output_tokens == 20
    assert without_ids(events[-1].response) == without_ids(whole)
    chat = client_of(server).chat.completions.create(model="lockstep", messages=HELLO, max_tokens=20, temperature=0)
    assert chat.choices[0].message.content == whole.output_text


def test_the_order_of_events(thinker):
    with saying(thinker, SAID):
        events = events_of(thinker, tools=TOOLS, extra_body=THINK, max_output_tokens=200)
        whole = ask(thinker, tools=TOOLS, extra_body=THINK, max_output_tokens=200)
    kinds = [event.type.removeprefix("response.") for event in events]
    steps = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    assert steps == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    thought, text, call = events[-1].response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "I think.")
    assert (text.type, text.content[0].text) == ("message", "So:")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "plot", {"x": 3, "side": "left"})
    assert without_ids(whole) == without_ids(events[-1].response)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments and whole.usage.output_tokens_details.reasoning_tokens > 1
    ids = {e.item_id for e in events if hasattr(e, "item_id")}
    assert ids == {item.id for item in events[-1].response.output}


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        dict(type="function", name="plot"),
        dict(type="allowed_tools", mode="required", tools=[dict(type="function", name="plot")]),
    ],
    ids=str,
)
def test_calls_that_are_asked_for(server, choice):
    found = ask(server, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=400)
    assert [item.type for item in found.output] == ["function_call"] and found.status == "completed"
    jsonschema.validate(json.loads(found.output[0].arguments), POINT)


def test_items_are_the_same_conversation(server):
    """Output items that a client sends back give the same prompt as the messages of chat completions."""
    call = dict(name="plot", arguments='{"x": 1, "side": "left"}')
    items = [
        dict(role="user", content=[dict(type="input_text", text="hello")]),
        dict(type="reasoning", id="rs_1", summary=[], content=[dict(type="reasoning_text", text="Hm.")]),
        dict(type="message", role="assistant", content=[dict(type="output_text", text="Yes.", annotations=[])]),
        dict(type="function_call", call_id="c1", **call),
        dict(type="function_call_output", call_id="c1", output="ok"),
        dict(type="web_search_call", id="ws_1", status="completed"),
    ]
    messages = [
        dict(role="system", content="Be brief."),
        *HELLO,
        dict(
            role="assistant",
            content="Yes.",
            reasoning_content="Hm.",
            tool_calls=[dict(id="c1", type="function", function=call)],
        ),
        dict(role="tool", tool_call_id="c1", content="ok"),
    ]
    chat = client_of(server).chat.completions.create(model="lockstep", messages=messages, max_tokens=24, temperature=0)
    found = ask(server, input=items, instructions="Be brief.")
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert (
        client_of(server)
        .responses.input_tokens.count(model="lockstep", input=items, instructions="Be brief.")
        .input_tokens
        == chat.usage.prompt_tokens
    )
    assert found.output_text == chat.choices[0].message.content


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_for_the_text(server, strict):
    """A keyword that cannot be enforced is ignored where the schema is not strict."""
    schema = POINT if strict else POINT | dict(uniqueItems=True)
    form = dict(type="json_schema", name="point", schema=schema, strict=strict)
    jsonschema.validate(json.loads(ask(server, text=dict(format=form), max_output_tokens=400).output_text), POINT)


def test_any_object_as_text(server):
    assert ask(server, text=dict(format=dict(type="json_object"))).output_text.startswith("{")


@pytest.mark.parametrize(
    "body, message",
    [
        (dict(previous_response_id="resp_1"), "keeps nothing"),
        (dict(conversation="c"), "keeps nothing"),
        (dict(prompt=dict(id="p")), "keeps nothing"),
        (dict(background=True), "background"),
        (dict(n=2), "n: expected 1"),
        (dict(input=[]), "at least one message"),
        (dict(input=3), "input"),
        (dict(input=[dict(type="item_reference", id="x")]), "keeps no items"),
        (dict(input=[dict(content="x")]), "role"),
        (dict(input=[dict(role="bot", content="x")]), "role"),
        (dict(input=[dict(role="user", content=[dict(type="input_image", image_url="x")])]), "reads only text"),
        (dict(text=dict(format=dict(type="json_schema", name="x"))), "schema"),
        (dict(tool_choice=dict(type="function", name="other"), tools=TOOLS), "no tool 'other'"),
        (dict(tool_choice=dict(type="file_search"), tools=TOOLS), "tool_choice"),
        (dict(max_output_tokens=0), "max_output"),
        (dict(top_logprobs=21), "top_logprobs: expected at most 20"),
        (dict(top_logprobs=-1), "top_logprobs"),
        (dict(reasoning=dict(effort="some")), "reasoning_effort"),
        (dict(instructions=[]), "instructions"),
    ],
)
def test_refusals(server, body, message):
    found = httpx.post(f"{server.url}/v1/responses", json=dict(input="hello", max_output_tokens=4) | body, timeout=60)
    assert found.status_code == 400 and message in found.json()["error"]["message"]


def test_a_failure_in_a_stream_is_an_event(server):
    def fails(*_):
        def mask(output_ids):
            raise ValueError("the grammar is too complex")

        return mask

    chat = server.service.chat
    chat.mask = fails
    try:
        events = events_of(server)
    finally:
        del chat.mask
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert "the grammar is too complex" in events[-1].response.error.message


WITH_LOGPROBS = dict(include=["message.output_text.logprobs"], top_logprobs=2, temperature=0.8)


def test_logprobs_are_those_of_chat_completions(server):
    options = dict(extra_body=dict(seed=3), **WITH_LOGPROBS)
    whole, events = ask(server, **options), events_of(server, **options)
    chat = client_of(server).chat.completions.create(
        model="lockstep", messages=HELLO, max_tokens=24, temperature=0.8, seed=3, logprobs=True, top_logprobs=2
    )
    part = whole.output[0].content[0]
    assert [token.model_dump() for token in part.logprobs] == [
        token.model_dump() for token in chat.choices[0].logprobs.content
    ]
    assert whole.top_logprobs == 2 and without_ids(events[-1].response) == without_ids(whole)
    told = [token.logprob for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert told == [token.logprob for token in part.logprobs] == [token.logprob for token in done.logprobs]
    assert ask(server, include=["reasoning.encrypted_content"]).output[0].content[0].logprobs == []


def test_logprobs_are_of_the_text_only(thinker):
    with saying(thinker, SAID):
        options = dict(tools=TOOLS, extra_body=THINK, max_output_tokens=200, **WITH_LOGPROBS)
        whole, events = ask(thinker, **options), events_of(thinker, **options)
    part = whole.output[1].content[0]
    assert part.text == "So:" and bytes(b for token in part.logprobs for b in token.bytes).decode().strip() == "So:"
    assert without_ids(events[-1].response) == without_ids(whole)


def test_only_the_item_in_which_an_answer_is_cut_off_is_incomplete(thinker):
    with saying(thinker, SAID):
        options = dict(tools=TOOLS, extra_body=THINK, max_output_tokens=len(thinker.service.tokenizer.encode(SAID)) - 9)
        whole, events = ask(thinker, **options), events_of(thinker, **options)
    assert [item.status for item in whole.output] == ["completed", "completed", "incomplete"]
    assert (
        [e.item.status for e in events if e.type == "response.output_item.done"]
        == [item.status for item in events[-1].response.output]
        == [item.status for item in whole.output]
    )
