"""/v1/messages with Anthropic's own client."""

import json

import anthropic
import httpx
import jsonschema
import pytest

from tests.serve.chatting import HELLO, PLOT, POINT, saying
from tests.serve.server import running

TOOLS = [
    dict(name=PLOT["name"], description=PLOT["description"], input_schema=POINT),
    dict(type="web_search_20250305", name="web_search", max_uses=3),
]
SAID = 'I think.\n</think>\n\nSo:\n<tool_call>\n{"name": "plot", "arguments": {"x": 3, "side": "left"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server():
    with running(api_keys=["right"]) as made:
        yield made


def client_of(server, key="right"):
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=120)


def ask(server, **options):
    extra = dict(temperature=options.pop("temperature", 0), seed=options.pop("seed", 0))
    return client_of(server).messages.create(
        **dict(model="lockstep", messages=HELLO, max_tokens=24, extra_body=extra) | options
    )


def stream(server, **options):
    """The events of a stream, as they are sent, and the client's message."""
    options = dict(model="lockstep", messages=HELLO, max_tokens=24, extra_body=dict(temperature=0, seed=0)) | options
    with client_of(server).messages.stream(**options) as made:
        for _ in made:
            pass
        return made.get_final_message()


def raw_events(server, **body):
    body = dict(messages=HELLO, max_tokens=24, temperature=0, stream=True) | body
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, headers={"x-api-key": "right"}) as response:
        blocks = response.read().decode().strip().split("\n\n")
    names, values = zip(*(block.split("\n") for block in blocks), strict=True)
    values = [json.loads(value.removeprefix("data: ")) for value in values]
    assert [name.removeprefix("event: ") for name in names] == [value["type"] for value in values]
    return values


def test_an_answer_whole_and_streamed(server):
    whole, streamed = ask(server, max_tokens=20), stream(server, max_tokens=20)
    assert whole.content[0].type == "text" and whole.content[0].text
    assert streamed.content[0].text == whole.content[0].text
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == streamed.usage.output_tokens == 20
    assert whole.usage.input_tokens == streamed.usage.input_tokens
    assert whole.role == "assistant" and whole.id.startswith("msg_")


def test_the_order_of_events(thinker):
    with saying(thinker, SAID):
        events = raw_events(thinker, tools=TOOLS, thinking=dict(type="enabled", budget_tokens=1024), max_tokens=200)
    kinds = [event["type"].removeprefix("content_block_") for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [[e for e in events if e.get("index") == i] for i in range(3)]
    assert [e["content_block"]["type"] for b in blocks for e in b[:1]] == ["thinking", "text", "tool_use"]
    assert [e for b in blocks for e in b] == events[1:-2]
    for block in blocks:
        assert [e["type"] for e in block] == [
            "content_block_start",
            *["content_block_delta"] * (len(block) - 2),
            "content_block_stop",
        ]
    pieces = [[e["delta"] for e in b[1:-1]] for b in blocks]
    assert "".join(d.get("thinking", "") for d in pieces[0]) == "I think."
    assert "".join(d["text"] for d in pieces[1]) == "So:"
    assert json.loads("".join(d["partial_json"] for d in pieces[2])) == {"x": 3, "side": "left"}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 10


def test_the_clients_view_of_it(thinker):
    options = dict(tools=TOOLS, thinking=dict(type="adaptive"), max_tokens=200)
    with saying(thinker, SAID):
        for found in (ask(thinker, **options), stream(thinker, **options)):
            thought, text, call = found.content
            assert (thought.thinking, text.text, call.name, call.input) == (
                "I think.",
                "So:",
                "plot",
                {"x": 3, "side": "left"},
            )
            assert found.stop_reason == "tool_use"


@pytest.mark.parametrize("choice", [dict(type="any"), dict(type="tool", name="plot")], ids=str)
def test_calls_that_are_asked_for(server, choice):
    found = ask(server, tools=TOOLS, tool_choice=choice, max_tokens=400, temperature=1.0, seed=3)
    assert found.stop_reason == "tool_use" or len(found.content) > 1
    jsonschema.validate(found.content[0].input, POINT)


def test_a_conversation_with_results(server):
    call = dict(type="tool_use", id="toolu_1", name="plot", input={"x": 1, "side": "left"})
    result = dict(type="tool_result", tool_use_id="toolu_1")
    texts = [dict(type="text", text="done", cache_control=dict(type="ephemeral")), dict(type="text", text="and more")]
    thought = dict(type="thinking", thinking="Hm.", signature="s")

    def messages(*results):
        return [
            *HELLO,
            dict(role="assistant", content=[thought, dict(type="text", text="See:"), call]),
            dict(role="user", content=[*results, dict(type="text", text="And now?")]),
        ]

    sizes = [
        client_of(server).messages.count_tokens(model="lockstep", tools=TOOLS[:1], messages=m).input_tokens
        for m in (
            messages(),
            messages(result),
            messages(result | dict(content="done")),
            messages(result | dict(content=texts, is_error=True)),
        )
    ]
    assert sizes == sorted(set(sizes))
    found = ask(server, messages=messages(result | dict(content=texts)), tools=TOOLS[:1], max_tokens=2)
    assert found.usage.input_tokens + found.usage.cache_read_input_tokens == sizes[-1]


def test_system_texts_and_stop_sequences(server):
    counted = client_of(server).messages.count_tokens
    one = counted(model="lockstep", messages=HELLO, system="Be brief.").input_tokens
    parts = [dict(type="text", text="Be"), dict(type="text", text="brief.")]
    assert counted(model="lockstep", messages=HELLO, system=parts).input_tokens >= one
    assert one > counted(model="lockstep", messages=HELLO).input_tokens
    free = ask(server).content[0].text
    found = ask(server, stop_sequences=[free[4:7], "never said"])
    assert (found.content[0].text, found.stop_reason, found.stop_sequence) == (
        free[: free.index(free[4:7])],
        "stop_sequence",
        free[4:7],
    )


def test_documents_that_are_texts_are_read(server):
    def size(*blocks):
        return (
            client_of(server)
            .messages.count_tokens(
                model="lockstep", messages=[dict(role="user", content=[*blocks, dict(type="text", text="And now?")])]
            )
            .input_tokens
        )

    document = dict(type="document", title="t", source=dict(type="text", media_type="text/plain", data="It is noon."))
    assert size(document) == size(dict(type="text", text="It is noon.")) > size()


def test_an_answer_is_begun_by_the_client(server):
    begun = [*HELLO, dict(role="assistant", content="def add(a, b):\n    return")]
    assert ask(server, messages=begun).content[0].text.startswith(" ")


def test_a_schema_for_the_answer(server):
    found = ask(server, output_config=dict(format=dict(type="json_schema", schema=POINT)), max_tokens=300)
    jsonschema.validate(json.loads(found.content[0].text), POINT)


@pytest.mark.parametrize(
    "body, message",
    [
        (dict(messages=[]), "messages"),
        (dict(messages=[dict(role="bot", content="x")]), "role"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=-2), "max_tokens"),
        (dict(system=3), "system"),
        (
            dict(messages=[dict(role="user", content=[dict(type="image", source={})])]),
            "messages[0].content[0]: this model",
        ),
        (
            dict(messages=[dict(role="user", content=[dict(type="document", source=dict(type="base64", data="x"))])]),
            "reads only text",
        ),
        (
            dict(messages=[dict(role="user", content=[dict(type="tool_result", content=[dict(type="image")])])]),
            "only text",
        ),
        (dict(messages=[dict(role="user", content=[dict(type="tool_result", content=3)])]), "text or blocks"),
        (dict(tools=[dict(name="bad name", input_schema={})]), "a name has"),
        (dict(tools=TOOLS, tool_choice=dict(type="tool", name="other")), "no tool 'other'"),
        (dict(tools=TOOLS, tool_choice=dict(type="tool")), "name"),
        (dict(tool_choice=dict(type="any")), "no tools"),
        (dict(thinking=dict(type="sometimes")), "thinking"),
        (dict(n=2), "n: expected 1"),
        (dict(messages=[dict(role="user", content="hello " * 2000)]), "context"),
    ],
)
def test_refusals_have_anthropics_shape(server, body, message):
    body = dict(messages=HELLO, max_tokens=4) | body
    found = httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": "right"}, timeout=60)
    assert found.status_code == 400 and found.json()["type"] == "error"
    assert found.json()["error"]["type"] == "invalid_request_error" and message in found.json()["error"]["message"]


def test_keys_and_models(server):
    with pytest.raises(anthropic.AuthenticationError):
        client_of(server, "wrong").messages.create(model="lockstep", messages=HELLO, max_tokens=1)
    with pytest.raises(anthropic.NotFoundError, match="no 'claude'"):
        ask(server, model="claude")
    bearer = anthropic.Anthropic(base_url=server.url, auth_token="right", max_retries=0)
    assert bearer.messages.create(model="lockstep", messages=HELLO, max_tokens=1).content
