"""Prompts of the largest allowed body are refused in time, and block no other request."""

import http.client
import json

import pytest

from tests.text.stalls import is_brief, longest_stall

LONG = "The quick brown fox, 12 äö!\n" * 170_000
TALK = [dict(role="user", content=LONG)]
TOOLS = [dict(type="function", function=dict(name=f"f{i}", description=LONG[:30_000])) for i in range(180)]
CALL = dict(id="call_1", type="function", function=dict(name="f0", arguments=json.dumps(dict(x=LONG))))
CALLED = [
    dict(role="user", content="x"),
    dict(role="assistant", content=None, tool_calls=[CALL]),
    dict(role="tool", tool_call_id="call_1", content="x"),
    dict(role="user", content="x"),
]


@pytest.mark.parametrize(
    "route, fields",
    [
        ("/v1/completions", dict(prompt=LONG)),
        ("/v1/completions", dict(prompt=" " * 7_000_000)),
        ("/v1/completions", dict(prompt=LONG, truncate_prompt_tokens=-1)),
        ("/v1/chat/completions", dict(messages=TALK)),
        ("/v1/chat/completions", dict(messages=CALLED)),
        ("/v1/responses", dict(input=LONG)),
        ("/v1/messages", dict(messages=TALK, max_tokens=1)),
        ("/v1/messages/count_tokens", dict(messages=TALK)),
        ("/v1/embeddings", dict(input=LONG)),
        ("/tokenize", dict(prompt=LONG, return_token_strs=True)),
        ("/tokenize", dict(messages=TALK)),
        ("/v1/chat/completions", dict(messages=[dict(role="user", content="x")], tools=TOOLS)),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_and_holds_up_nothing(thinker, route, fields):
    raw = json.dumps(fields).encode()
    connection = http.client.HTTPConnection("127.0.0.1", thinker.port, timeout=300)
    with longest_stall() as longest:
        connection.request("POST", route, raw)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    connection.close()
    assert answer.status == 400, found
    assert "tokens that it may have" in found["error"]["message"], found
    assert is_brief(longest[0])


def test_a_long_text_may_be_counted_and_cut(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    text = LONG[:200_000]
    counts = []
    for route, fields in [
        ("/tokenize", dict(prompt=text)),
        ("/v1/completions", dict(prompt=text, truncate_prompt_tokens=20, max_tokens=1)),
    ]:
        connection.request("POST", route, json.dumps(fields).encode())
        answer = connection.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
        counts.append(found.get("count") or found["usage"]["prompt_tokens"])
    connection.close()
    assert counts[0] > 50_000 and counts[1] == 20
