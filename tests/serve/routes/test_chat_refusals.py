"""Refusals of the conversation routes: mistakes, attacks and random bodies, never with a 500 and never late."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.chatting import HELLO, PLOT, POINT, talking
from tests.slowness import is_within
from tests.text.stalls import longest_stall

CHAT = "/v1/chat/completions"
TOOL = dict(type="function", function=PLOT)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as made:
        yield made


def refusal(http, body, path=CHAT):
    """The message of a 400; the server then still answers."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    found = http.post(path, content=content)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1200
    return error["message"]


def image(kind):
    return [dict(role="user", content=[{"type": kind, kind: {"url": "http://127.0.0.1/x"}}])]


def called(arguments):
    function = dict(name="f", arguments=arguments)
    return [*HELLO, dict(role="assistant", tool_calls=[dict(id="x", type="function", function=function)])]


def schema(value, strict=True):
    return dict(response_format=dict(type="json_schema", json_schema=dict(name="x", schema=value, strict=strict)))


@pytest.mark.parametrize("body, message", [
    (dict(messages=None), "messages"), (dict(messages="hello"), "messages"), (dict(messages=[]), "at least one"),
    (dict(messages=[3]), "messages[0]"), (dict(messages=[{}]), "role"), (dict(messages=[dict(content="x")]), "role"),
    (dict(messages=[dict(role="robot", content="x")]), "role"), (dict(messages=[dict(role="user")]), "null"),
    (dict(messages=[dict(role="user", content=3)]), "content"),
    (dict(messages=[dict(role="user", content=[dict(text="x")])]), "messages[0].content[0].type"),
    (dict(messages=image("image_url")), "reads only text"), (dict(messages=image("input_audio")), "reads only text"),
    (dict(messages=called(3)), "arguments"), (dict(messages=called([1])), "arguments"),
    (dict(n=0), "n:"), (dict(n=1000), "n:"), (dict(n="2"), "n:"), (dict(n=65), "n:"), (dict(temperature="hot"), "temp"),
    (dict(temperature=-1), "temperature"), (dict(max_tokens=-5), "max_tokens"), (dict(max_tokens=0), "max_tokens"),
    (dict(max_completion_tokens=1.5), "max_completion_tokens"), (dict(top_logprobs=3), "logprobs to be true"),
    (dict(logprobs=True, top_logprobs=99), "at most 20"), (dict(logprobs=1), "logprobs"),
    (dict(stream="yes"), "stream"),
    (dict(stop=["x"] * 99), "stop"), (dict(seed="a"), "seed"), (dict(logit_bias={"x": 1}), "logit_bias"),
    (dict(logit_bias={"99999": 1}), "logit_bias"), (dict(stream_options=[]), "stream_options"),
    (dict(tools=3), "tools"), (dict(tools=[dict(type="function", function=dict(name=""))]), "a name has"),
    (dict(tools=[TOOL, dict(type="function")]), "tools[1].function: this field is required"),
    (dict(tools=[dict(type="function", function=dict(name="f", parameters=dict(type="string")))]), "of type object"),
    (dict(tools=[TOOL, TOOL]), "more than once"), (dict(tools=[TOOL] * 300), "at most 256"),
    (dict(tools=[TOOL], tool_choice="always"), "tool_choice: expected 'none'"),
    (dict(tools=[TOOL], tool_choice=dict(type="function")), "tool_choice.function"),
    (dict(tools=[TOOL], tool_choice=dict(type="allowed_tools")), "tool_choice.allowed_tools"),
    (dict(tools=[TOOL], tool_choice=dict(type="custom")), "tool_choice.type"),
    (dict(tool_choice="required"), "no tools"),
    (dict(tools=[TOOL], tool_choice=dict(type="function", function=dict(name="other"))), "no tool 'other'"),
    (dict(tools=[dict(type="function", function=dict(name="f", parameters=[]))]), "parameters"),
    (dict(response_format=dict(type="xml")), "response_format"), (schema(None), "response_format"),
    (schema(3), "schema"), (schema(dict(type="array", uniqueItems=True)), "uniqueItems"),
    (schema(dict(type="nothing")), "nothing"), (schema({"$ref": "http://127.0.0.1:1/x"}), "127.0.0.1"),
    (schema({"$ref": "file:///etc/passwd"}), "etc/passwd"),
    (dict(guided_regex="["), "regex"), (dict(guided_regex="(?=x)y"), "look"),
    (dict(guided_grammar="start: ?"), "Expected value"),
    (dict(guided_choice=[]), "choice"), (dict(guided_json="{"), "JSON"),
    (dict(guided_json="[1]"), "expected an object"),
    (dict(guided_regex="a", guided_choice=["b"]), "at most one form"),
    (dict(structured_outputs=dict(json=POINT, regex="a")), "at most one form"),
    (dict(reasoning_effort="enormous"), "reasoning_effort"),
    (dict(chat_template_kwargs=dict(chat_template="{{ 1 }}")), "cannot be set"),
    (dict(chat_template_kwargs=dict(tokenize=True)), "cannot be set"),
    (dict(chat_template_kwargs=dict(messages=[])), "cannot be set"),
    (dict(chat_template_kwargs=dict(add_generation_prompt=False)), "cannot be set"),
    (dict(chat_template_kwargs=dict(enable_thinking={"a": 1})), "enable_thinking"),
    (dict(chat_template_kwargs=dict(enable_thinking="x" * 20_000)), "enable_thinking"),
    (dict(continue_final_message=True), "assistant"),
    (dict(messages=[dict(role="user", content="a " * 2000)]), "context"),
])  # fmt: skip
def test_mistakes(http, body, message):
    assert message in refusal(http, dict(messages=HELLO, max_tokens=2) | body)


@pytest.mark.parametrize(
    "where",
    [
        '"messages":[{"role":"user","content":"\\ud800"}]',
        '"messages":[{"role":"user","content":"x"}],"guided_regex":"\\udfff"',
        '"messages":[{"role":"user","content":"x"}],"stop":"\\ud800x"',
    ],
)
def test_lone_surrogates(http, where):
    assert "surrogate" in refusal(http, ("{" + where + "}").encode())


def test_grammars_that_take_long_make_nobody_elses_request_a_mistake(http, server):
    """The slow requests are answered or get a 429; /health and requests with small grammars are answered meanwhile."""

    def ask(url=server.url, **more):
        return httpx.post(f"{url}/v1/completions", json=dict(prompt="x", max_tokens=9) | more, timeout=120)

    def ask_slow(number):
        return ask(guided_json=dict(properties={f"p{number}_{i}": {} for i in range(3000)}))

    with ThreadPoolExecutor(4) as others, longest_stall() as longest:
        asked, small, num_answered = [others.submit(ask_slow, n) for n in range(4)], [], 0
        while not all(each.done() for each in asked):
            assert http.get("/health").status_code == 200
            num_answered += 1
            if len(small) < 20:
                small.append(others.submit(ask, guided_regex=f"[ab]{{{len(small) + 1}}}"))
            time.sleep(0.01)
    assert {each.result().status_code for each in small} == {200}
    found = {each.result().status_code for each in asked}
    assert 200 in found and found <= {200, 429}
    assert num_answered > 20, "those that take long would be answered first, one after the other"
    assert is_within(longest[0], 1)


def deep(levels):
    return '{"items":' * levels + "{}" + "}" * levels


def test_nested_bodies(http):
    start = '{"messages":[{"role":"user","content":"x"}],'
    for body in (
        f'{start}"guided_json":{deep(2000)}}}',
        f'{start}"tools":[{deep(90_000)}]}}',
        f'{start}"chat_template_kwargs":{"[" * 200_000}',
    ):
        assert refusal(http, body.encode())


def all_of(levels):
    return dict(type="string") if levels == 0 else dict(allOf=[all_of(levels - 1)] * 2)


BOMBS = dict(
    all_of=schema(all_of(11)),
    lengths=schema(dict(type="string", minLength=10**9)),
    multiples=schema(dict(type="integer", multipleOf=999983)),
    items=schema(dict(type="array", minItems=10**9, items=dict(type="array", minItems=10**9))),
    pattern=schema(dict(type="string", pattern="^((a{1,500}){1,500}){1,500}$")),
    properties=schema(dict(type="object", properties={f"p{i}": dict(type="integer") for i in range(2000)})),
    enum=schema(dict(enum=[f"v{i}" for i in range(10_000)])),
    backtracking=dict(guided_regex="(x+x+)+y"),
    repeats=dict(guided_regex="((a{1,1000}){1,1000}){1,1000}"),
    letters=dict(guided_regex=r"(\p{L}{1,99}\w{1,99}){99}"),
    ambiguous=dict(guided_grammar='start: a\na: a a | a a a | "x" | ""'),
    products=dict(guided_json=dict(allOf=[dict(multipleOf=float(f"1.{i:06d}1e300")) for i in range(5000)])),
    product_tools=dict(
        tool_choice="required",
        tools=[
            dict(
                type="function",
                function=dict(name="f", parameters=dict(allOf=[dict(multipleOf=i) for i in range(2, 400)])),
            )
        ],
    ),
    zero=dict(guided_json=dict(type="integer", multipleOf=99999989, examples=[dict(multipleOf=0)])),
    hidden=dict(
        guided_json={
            "$ref": "http://a/b#/x",
            "$defs": {"c": {"$id": "http://a/b", "x": dict(type="integer", multipleOf=99999989)}},
        }
    ),
    large=dict(guided_grammar="start: " + '"a" ' * 80_000),
    tools=dict(
        tools=[dict(type="function", function=dict(name=f"f{i}", parameters=all_of(8))) for i in range(64)],
        tool_choice="required",
    ),
)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(http, name):
    """Refused or answered, the request takes about as much processor time as an ordinary one."""
    began = time.process_time()
    found = http.post(CHAT, json=dict(messages=HELLO, max_tokens=8, temperature=1) | BOMBS[name])
    assert found.status_code in (200, 400), found.text
    assert is_within(time.process_time() - began, 10)
    assert http.post(CHAT, json=dict(messages=HELLO, max_tokens=1)).status_code == 200


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, dict(messages=HELLO)),
        ("/v1/messages", dict(messages=HELLO, max_tokens=3)),
        ("/v1/messages/count_tokens", dict(messages=HELLO)),
        ("/v1/responses", dict(input="hello")),
    ],
)
def test_a_model_without_chat_template(path, body):
    with talking(None) as server:
        found = httpx.post(server.url + path, json=body, timeout=60)
    assert found.status_code == 400 and "no chat template" in found.json()["error"]["message"]


def test_a_template_that_refuses():
    with talking("{{ raise_exception('Roles must alternate') }}") as server:
        found = httpx.post(server.url + CHAT, json=dict(messages=HELLO), timeout=60)
    assert found.status_code == 400 and "Roles must alternate" in found.json()["error"]["message"]


# ---------------------------------------------------------------- random bodies

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-2, 2)
    | st.sampled_from(["", "x", "user", "assistant", "tool", "text", "function", "required", "json_schema", "null"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "type",
                    "text",
                    "name",
                    "function",
                    "tools",
                    "parameters",
                    "properties",
                    "id",
                    "schema",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"]) | ANY
MESSAGES = st.lists(
    st.fixed_dictionaries(
        dict(role=ROLES),
        optional=dict(
            content=st.text("ab", max_size=3) | ANY, tool_calls=ANY, reasoning_content=ANY, tool_call_id=ANY, name=ANY
        ),
    ),
    max_size=3,
)
CHOICES = st.sampled_from(["none", "auto", "required"]) | ANY
FIELDS = {
    CHAT: dict(
        messages=MESSAGES | ANY,
        tools=ANY,
        tool_choice=CHOICES,
        response_format=ANY,
        guided_json=ANY,
        chat_template_kwargs=ANY,
        stop=ANY,
        n=ANY,
        logprobs=ANY,
        top_logprobs=ANY,
        stream_options=ANY,
        structured_outputs=ANY,
        reasoning_effort=ANY,
        continue_final_message=ANY,
        stream=st.booleans(),
    ),
    "/v1/messages": dict(
        messages=MESSAGES | ANY,
        system=ANY,
        tools=ANY,
        tool_choice=ANY,
        thinking=ANY,
        stop_sequences=ANY,
        output_config=ANY,
        stream=st.booleans(),
        max_tokens=st.just(2),
    ),
    "/v1/responses": dict(
        input=MESSAGES | ANY,
        tools=ANY,
        tool_choice=CHOICES,
        text=ANY,
        reasoning=ANY,
        instructions=ANY,
        metadata=ANY,
        stream=st.booleans(),
        max_output_tokens=st.just(2),
    ),
}


@pytest.mark.parametrize("path", FIELDS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_bodies(http, path, data):
    body = data.draw(st.fixed_dictionaries({}, optional=FIELDS[path]))
    found = http.post(path, json=dict(max_tokens=2) | body)
    assert found.status_code in (200, 400), (found.status_code, body)
    if found.status_code == 400:
        assert found.json()["error"]["message"]
