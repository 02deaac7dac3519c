"""Agents and their client libraries: typed answers, loops of tool calls and results, bodies with many fields."""

import json
from typing import Literal

import anthropic
import httpx
import openai
import pydantic

from tests.serve.chatting import HELLO, PLOT, POINT, saying

CALL = '<tool_call>\n{"name": "plot", "arguments": {"x": 3, "side": "left"}}\n</tool_call>'


class Point(pydantic.BaseModel):
    """A typed answer."""

    x: int = pydantic.Field(ge=0, le=99)
    side: Literal["left", "right"]


def openai_client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120)


def test_typed_answers(server):
    client = openai_client(server)
    options = dict(model="lockstep", messages=HELLO, temperature=0, response_format=Point)
    found = client.chat.completions.parse(**options).choices[0].message.parsed
    with client.chat.completions.stream(**options) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    other = client.responses.parse(model="lockstep", input="hello", temperature=0, text_format=Point).output_parsed
    assert found == streamed == other and found.side in ("left", "right")


def test_a_loop_of_chat_completions(thinker):
    client, messages = openai_client(thinker), list(HELLO)
    tools = [dict(type="function", function=PLOT)]
    with saying(thinker, CALL):
        with client.chat.completions.stream(model="lockstep", messages=messages, tools=tools) as stream:
            answer = stream.get_final_completion().choices[0]
    assert answer.finish_reason == "tool_calls"
    messages.append(answer.message.model_dump(exclude_none=True))
    messages += [dict(role="tool", tool_call_id=call.id, content="plotted") for call in answer.message.tool_calls]
    with saying(thinker, "Done."):
        last = client.chat.completions.create(model="lockstep", messages=messages, tools=tools).choices[0]
    assert (last.message.content, last.finish_reason) == ("Done.", "stop")


def test_a_loop_of_responses(thinker):
    client = openai_client(thinker)
    items, tools = [dict(role="user", content="hello")], [dict(type="function", **PLOT)]
    with saying(thinker, f"Hm.</think>\n\n{CALL}"):
        thinking = dict(chat_template_kwargs=dict(enable_thinking=True))
        found = client.responses.create(model="lockstep", input=items, tools=tools, extra_body=thinking)
    items += [item.model_dump(exclude_none=True) for item in found.output]
    items += [
        dict(type="function_call_output", call_id=item.call_id, output="plotted")
        for item in found.output
        if item.type == "function_call"
    ]
    assert [item["type"] for item in items[1:]] == ["reasoning", "function_call", "function_call_output"]
    with saying(thinker, "Done."):
        assert client.responses.create(model="lockstep", input=items, tools=tools).output_text == "Done."


def test_a_loop_of_messages(thinker):
    client = anthropic.Anthropic(base_url=thinker.url, api_key="any", max_retries=0, timeout=120)
    tools = [dict(name="plot", description="Plots.", input_schema=POINT)]
    with saying(thinker, f"So:\n{CALL}"):
        with client.messages.stream(model="lockstep", messages=HELLO, max_tokens=200, tools=tools) as stream:
            found = stream.get_final_message()
    results = [
        dict(type="tool_result", tool_use_id=block.id, content="plotted")
        for block in found.content
        if block.type == "tool_use"
    ]
    messages = [*HELLO, dict(role="assistant", content=found.content), dict(role="user", content=results)]
    with saying(thinker, "Done."):
        last = client.messages.create(model="lockstep", messages=messages, max_tokens=200, tools=tools)
    assert (last.content[0].text, last.stop_reason) == ("Done.", "end_turn")


def test_a_body_with_all_that_coding_agents_send(server):
    """Fields and tools that this server does not know are ignored, also with the usual query ?beta=true."""
    cached = dict(cache_control=dict(type="ephemeral", ttl="1h"))
    tools = [
        dict(
            name=f"tool_{i}",
            description="Does things. " * 5,
            input_schema={"$schema": "https://json-schema.org/draft/2020-12/schema", **POINT},
            **cached,
        )
        for i in range(4)
    ]
    body = dict(
        model="lockstep",
        max_tokens=32_000,
        stream=True,
        temperature=1,
        metadata=dict(user_id="u"),
        system=[dict(type="text", text="You are an agent.", **cached), dict(type="text", text="Be careful.")],
        tools=[*tools, dict(type="web_search_20250305", name="web_search", max_uses=8)],
        thinking=dict(type="enabled", budget_tokens=31_999),
        context_management=dict(edits=[]),
        stop_sequences=["\n"],
        messages=[
            dict(role="user", content=[dict(type="text", text="<reminder>"), dict(type="text", text="hi", **cached)]),
            dict(
                role="assistant",
                content=[
                    dict(type="thinking", thinking="Hm.", signature=""),
                    dict(type="tool_use", id="toolu_01", name="tool_0", input={"x": 1, "side": "left"}, **cached),
                ],
            ),
            dict(
                role="user",
                content=[
                    dict(
                        type="tool_result",
                        tool_use_id="toolu_01",
                        is_error=True,
                        content=[dict(type="text", text="failed")],
                        **cached,
                    )
                ],
            ),
            dict(role="system", content="Mind the time."),
        ],
    )
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "interleaved-thinking-2025-05-14"}
    found = httpx.post(f"{server.url}/v1/messages?beta=true", json=body, headers=headers, timeout=60)
    assert found.status_code == 200 and found.text.rstrip().endswith('{"type":"message_stop"}')
    del body["max_tokens"], body["stream"]
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens?beta=true", json=body, headers=headers, timeout=60)
    start = json.loads(found.text.split("\n")[1].removeprefix("data: "))["message"]["usage"]
    assert counted.json()["input_tokens"] == start["input_tokens"] + start["cache_read_input_tokens"]


def test_a_response_with_all_that_coding_agents_send(server):
    text = [dict(type="input_text", text="hello")]
    body = dict(
        model="lockstep",
        instructions="You are an agent.",
        stream=True,
        store=False,
        max_output_tokens=8,
        input=[dict(type="message", role="developer", content=text), dict(type="message", role="user", content=text)],
        tools=[
            dict(
                type="function",
                name="shell",
                strict=False,
                parameters=dict(
                    type="object",
                    properties=dict(command=dict(type="array", items=dict(type="string"))),
                    required=["command"],
                ),
            ),
            dict(type="web_search"),
            dict(type="custom", name="apply_patch", format=dict(type="grammar", syntax="lark", definition="start: x")),
            dict(type="local_shell"),
        ],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning=dict(effort="medium", summary="auto"),
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        text=dict(verbosity="low"),
    )
    found = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert found.status_code == 200 and "event: response.incomplete" in found.text
