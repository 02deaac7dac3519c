"""/v1/chat/completions with OpenAI's own client."""

import concurrent.futures
import json
import re

import httpx
import jsonschema
import openai
import pytest

from lockstep import SamplingParams
from tests.serve.chatting import HELLO, PLOT, POINT, saying

TOOLS = [dict(type="function", function=PLOT), dict(type="function", function=dict(name="now"))]


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120)


def ask(client, **options):
    return client.chat.completions.create(**dict(model="lockstep", messages=HELLO, max_tokens=24) | options)


def parts_of(client, **options):
    """The chunks of a stream, and the message of them: (chunks, text, thought, calls, finish_reason)."""
    chunks = list(ask(client, stream=True, **options))
    text = thought = ""
    calls, reason = [], None
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert reason is None
        reason = choice.finish_reason
        text += choice.delta.content or ""
        thought += getattr(choice.delta, "reasoning_content", None) or ""
        for piece in choice.delta.tool_calls or ():
            if piece.id is not None:
                assert piece.index == len(calls) and piece.type == "function"
                calls.append([piece.function.name, ""])
            calls[piece.index][1] += piece.function.arguments
    return chunks, text, thought, [tuple(call) for call in calls], reason


def message_parts(choice):
    message = choice.message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", getattr(message, "reasoning_content", None) or "", calls, choice.finish_reason


def test_an_answer_is_the_engines(client, server, llm):
    found = ask(client, temperature=0.8, seed=5, logprobs=True, top_logprobs=2)
    ids = llm.chat_prompt(HELLO)
    alone = llm.generate([ids], SamplingParams(max_tokens=24, temperature=0.8, seed=5, logprobs=2))[0]
    choice = found.choices[0]
    assert choice.message.content == alone.text and choice.finish_reason == alone.finish_reason
    assert [t.logprob for t in choice.logprobs.content] == alone.logprobs
    assert b"".join(bytes(t.bytes) for t in choice.logprobs.content).decode() == alone.text
    assert [[other.logprob for other in t.top_logprobs] for t in choice.logprobs.content] == [
        list(top.values()) for top in alone.top_logprobs
    ]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), len(alone.token_ids))
    assert found.system_fingerprint == server.service.fingerprint and found.object == "chat.completion"
    assert ask(client, messages=HELLO * 90, max_tokens=1).usage.prompt_tokens_details.cached_tokens == 0
    again = ask(client, messages=HELLO * 90, max_tokens=1).usage
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_a_stream_in_its_parts(client):
    options = dict(temperature=0.8, seed=5, logprobs=True, top_logprobs=1)
    whole = ask(client, **options)
    chunks, text, _, _, reason = parts_of(client, stream_options=dict(include_usage=True), **options)
    assert (text, reason) == (whole.choices[0].message.content, whole.choices[0].finish_reason)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert chunks[-1].choices == [] and chunks[-1].usage.model_dump() == whole.usage.model_dump()
    *middle, last = chunks[:-1]
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in middle)
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk", "lockstep")
    }
    found = [t for chunk in middle if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert found == whole.choices[0].logprobs.content


def test_a_stream_as_it_is_sent(server):
    body = dict(messages=HELLO, max_tokens=3, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert all("usage" not in chunk and "finish_reason" in chunk["choices"][0] for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_several_samples(client):
    options = dict(n=3, temperature=1.0, seed=3)
    whole = ask(client, **options)
    texts = [""] * 3
    for chunk in ask(client, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and len(set(texts)) == 3
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage.completion_tokens == 72


def test_answers_are_the_same_alone_and_under_load(client):
    """Free answers and answers with a grammar, bit for bit."""
    schema = dict(type="json_schema", json_schema=dict(name="point", strict=True, schema=POINT))
    requests = [
        dict(
            seed=i,
            temperature=1.0,
            logprobs=True,
            top_logprobs=3,
            max_tokens=20 + i,
            messages=[{"role": "user", "content": f"number {i} " * (i + 1)}],
            **(dict(response_format=schema) if i % 3 == 0 else {}),
        )
        for i in range(16)
    ]

    def run(options):
        return ask(client, **options).choices[0].model_dump()

    alone = [run(options) for options in requests]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(run, requests)) == alone


def test_content_in_parts_null_content_and_all_roles(client):
    text = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    joined = ask(client, temperature=0, messages=[{"role": "user", "content": "hel\nlo"}])
    assert ask(client, temperature=0, messages=[{"role": "user", "content": text}]).choices == joined.choices
    messages = [
        dict(role="system", content="Be brief."),
        dict(role="developer", content="Really."),
        *HELLO,
        dict(
            role="assistant",
            content=None,
            tool_calls=[dict(id="a1", type="function", function=dict(name="now", arguments=""))],
        ),
        dict(role="tool", tool_call_id="a1", content="noon"),
    ]
    assert ask(client, messages=messages).choices[0].message.content
    assert ask(client, messages=[*HELLO, dict(role="assistant", content=None), *HELLO]).choices[0].message.content


def test_fields_that_nobody_knows_and_nulls_are_ignored(client):
    more = dict(
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        made_up=[1],
        tools=None,
        stop=None,
        logit_bias=None,
        response_format=None,
        tool_choice=None,
        seed=None,
        max_completion_tokens=None,
    )
    assert ask(client, extra_body=more, temperature=0).choices == ask(client, temperature=0).choices


def test_max_tokens_by_both_names_and_up_to_the_context(client):
    assert ask(client, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3
    assert ask(client, max_tokens=9, max_completion_tokens=4).usage.completion_tokens == 4
    found = ask(client, max_tokens=10_000, extra_body=dict(ignore_eos=True))
    assert found.usage.total_tokens == 1024 and found.choices[0].finish_reason == "length"


def test_stop_and_bias(client):
    free = ask(client, temperature=0).choices[0].message.content
    assert ask(client, temperature=0, stop=free[4:7]).choices[0].message.content == free[: free.index(free[4:7])]
    biased = ask(client, temperature=0, max_tokens=4, logit_bias={"77": 100}, logprobs=True)
    assert len({t.token for t in biased.choices[0].logprobs.content}) == 1


# ---------------------------------------------------------------- the format of the text


@pytest.mark.parametrize("strict", [True, False])
def test_json_schema(client, strict):
    wanted = dict(type="json_schema", json_schema=dict(name="point", strict=strict, schema=POINT))
    for seed in range(4):
        found = ask(client, response_format=wanted, temperature=1.0, seed=seed, max_tokens=300)
        jsonschema.validate(json.loads(found.choices[0].message.content), POINT)
        assert found.choices[0].finish_reason == "stop"


def test_several_samples_under_one_grammar(client):
    wanted = dict(type="json_schema", json_schema=dict(name="point", strict=True, schema=POINT))
    options = dict(response_format=wanted, temperature=1.0, seed=3, max_tokens=300)
    found = ask(client, n=4, **options).choices
    points = [json.loads(choice.message.content) for choice in found]
    for point in points:
        jsonschema.validate(point, POINT)
    assert len({json.dumps(point) for point in points}) > 1
    assert ask(client, **options).choices[0].message == found[0].message


def test_json_object(client):
    found = ask(client, response_format=dict(type="json_object"), temperature=1.0, seed=1, max_tokens=900)
    assert found.choices[0].finish_reason == "length" or isinstance(json.loads(found.choices[0].message.content), dict)
    assert found.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    "more, pattern",
    [
        (dict(guided_regex=r"[a-c]{3}-\d\d"), r"[a-c]{3}-\d\d"),
        (dict(structured_outputs=dict(regex=r"\d{4}")), r"\d{4}"),
        (dict(guided_choice=["left", "right"]), "left|right"),
        (dict(guided_grammar='start: "(" start ")" | "x"{1,3}'), r"\(*x{1,3}\)*"),
        (dict(structured_outputs=dict(grammar='start: /[xyz]{2}/ "!"')), "[xyz]{2}!"),
        (dict(guided_json=json.dumps(POINT)), r"\{[^}]*\}"),
        (dict(structured_outputs=dict(json=POINT)), r"\{[^}]*\}"),
        (dict(response_format=dict(type="regex", pattern="a{2,3}")), "a{2,3}"),
        (dict(response_format=dict(type="grammar", grammar='start: "b"')), "b"),
        (dict(response_format=dict(type="text")), "(?s:.*)"),
        (dict(guided_regex="ab", min_tokens=10), "ab"),
    ],
)
def test_other_forms(client, more, pattern):
    found = ask(client, temperature=1.0, seed=4, max_tokens=300, extra_body=more).choices[0]
    assert re.fullmatch(pattern, found.message.content) and (found.finish_reason == "stop" or "text" in str(more))


# ---------------------------------------------------------------- tools


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        dict(type="function", function=dict(name="plot")),
        dict(
            type="allowed_tools",
            allowed_tools=dict(mode="required", tools=[dict(type="function", function=dict(name="plot"))]),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["server", "thinker"])
def test_calls_that_are_asked_for(which, choice, request):
    """With a template without tools, and with one that has them; without a grammar the model would call no tool."""
    client = client_of(request.getfixturevalue(which))
    thinks = dict(chat_template_kwargs=dict(enable_thinking=False)) if which == "thinker" else {}
    options = dict(
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=1.0,
        seed=7,
        max_tokens=400,
        extra_body=thinks,
    )
    found = ask(client, **options).choices[0]
    _, _, calls, reason = message_parts(found)
    assert reason == "tool_calls" and found.message.content is None and len(calls) == 1
    name, arguments = calls[0]
    assert name == "plot" or choice == "required"
    if name == "plot":
        jsonschema.validate(json.loads(arguments), POINT)
    assert parts_of(client, **options)[1:] == ("", "", calls, "tool_calls")


def test_tools_that_may_not_be_called(client):
    free = ask(client, temperature=0)
    assert ask(client, temperature=0, tools=TOOLS, tool_choice="none").choices == free.choices


CALL = '<tool_call>\n{"name": "plot", "arguments": {"x": 3, "side": "left"}}\n</tool_call>'
ARGUMENTS = '{"x": 3, "side": "left"}'


@pytest.mark.parametrize(
    "said, opened, text, thought, calls",
    [
        ("Hello.", False, "Hello.", "", []),
        ("<think>\nHm.\n</think>\n\nHello.", False, "Hello.", "Hm.", []),
        ("Hm.\n</think>\n\nHello.", True, "Hello.", "Hm.", []),
        (f"I plot.\n{CALL}\n{CALL}", False, "I plot.", "", [("plot", ARGUMENTS)] * 2),
        (f"Which?\n</think>\n\n{CALL}", True, "", "Which?", [("plot", ARGUMENTS)]),
    ],
)
def test_what_a_model_says_is_taken_apart(thinker, said, opened, text, thought, calls):
    client, kwargs = client_of(thinker), dict(enable_thinking=True) if opened else {}
    options = dict(tools=TOOLS, max_tokens=200, extra_body=dict(chat_template_kwargs=kwargs))
    with saying(thinker, said):
        found = ask(client, **options).choices[0]
        streamed = parts_of(client, **options)
    expected = (text, thought, calls, "tool_calls" if calls else "stop")
    assert message_parts(found) == expected == streamed[1:]


def test_a_call_that_is_cut_off(thinker):
    with saying(thinker, CALL):
        found = parts_of(client_of(thinker), tools=TOOLS, max_tokens=20)
    assert found[4] == "length" and ARGUMENTS.startswith(found[3][0][1])


def test_a_call_that_is_cut_off_in_its_closing_mark(thinker):
    length = len(thinker.service.tokenizer.encode(CALL, add_special_tokens=False))
    for missing in range(1, 8):
        with saying(thinker, CALL):
            found = parts_of(client_of(thinker), tools=TOOLS, max_tokens=length - missing)
        assert found[1:] == ("", "", [("plot", ARGUMENTS)], "length")


NO_LOOKAHEAD = dict(
    type="object",
    properties=dict(to=dict(type="string", pattern="^(?!x)[a-z]+$", maxLength=9)),
    required=["to"],
    additionalProperties=False,
)


def test_a_pattern_that_cannot_be_enforced_is_ignored_unless_strict(client):
    wanted = dict(type="json_schema", json_schema=dict(name="n", strict=False, schema=NO_LOOKAHEAD))
    assert set(json.loads(ask(client, response_format=wanted, max_tokens=200).choices[0].message.content)) == {"to"}
    mail = dict(type="function", function=dict(name="mail", parameters=NO_LOOKAHEAD))
    options = dict(tool_choice="required", parallel_tool_calls=False, temperature=1.0, max_tokens=400)
    for seed in range(4):
        [(name, arguments)] = message_parts(ask(client, tools=[*TOOLS, mail], seed=seed, **options).choices[0])[2]
        if name in ("plot", "mail"):
            jsonschema.validate(
                json.loads(arguments),
                POINT if name == "plot" else NO_LOOKAHEAD | {"properties": {}} | {"additionalProperties": True},
            )


@pytest.mark.parametrize("arguments", ['{"x": 1, "si', "not json", "[1]", "[" * 9000, "", "5"])
def test_a_call_that_was_cut_off_may_be_sent_back(server, arguments):
    call = dict(id="c", type="function", function=dict(name="plot", arguments=arguments))
    messages = [*HELLO, dict(role="assistant", tool_calls=[call]), dict(role="tool", tool_call_id="c", content="bad")]
    tokens = httpx.post(f"{server.url}/tokenize", json=dict(messages=messages)).json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json=dict(tokens=tokens)).json()
    assert arguments.replace('"', '\\"') in text["prompt"]


def test_effort_and_earlier_thoughts_reach_the_template(thinker):
    def prompt(**options):
        return ask(client_of(thinker), max_tokens=1, **options).usage.prompt_tokens

    plain = prompt()
    assert prompt(reasoning_effort="none") == prompt(extra_body=dict(chat_template_kwargs=dict(enable_thinking=False)))
    assert prompt(reasoning_effort="high") > plain
    earlier = dict(role="assistant", content="Yes.")
    assert prompt(messages=[*HELLO, earlier | dict(reasoning_content="Hm hm."), *HELLO]) > prompt(
        messages=[*HELLO, earlier, *HELLO]
    )


def test_a_message_is_continued(client, llm):
    begun = [*HELLO, dict(role="assistant", content="def f(x):\n    return")]
    found = ask(client, messages=begun, temperature=0, extra_body=dict(continue_final_message=True))
    prompt = llm.tokenizer.render_chat(HELLO) + begun[-1]["content"]
    assert found.choices[0].message.content == llm.generate([prompt], SamplingParams(max_tokens=24))[0].text
