"""Random damage to requests, from fixed seeds: always an answer with a clear status, never a 500, never silence.

LOCKSTEP_SOAK=minutes goes on with fresh seeds for so long, and allows no answer more than a second (`make soak`).
"""

import json
import os
import random
import time
from collections import Counter

import pytest
from starlette.routing import Route

from lockstep.serve.http.limits import Limits
from tests.serve.http.raw import connect, head
from tests.serve.http.server import running, wait_until

ROUNDS = 500
MESSAGES = [dict(role="user", content="hello")]
SCHEMA = dict(
    type="object",
    required=["a"],
    properties=dict(
        a=dict(type="string", maxLength=3, pattern="^a", format="date"),
        c=dict(enum=["x", None]),
        b=dict(anyOf=[dict(type="null"), {"$ref": "#/$defs/x"}]),
    ),
    **{"$defs": dict(x=dict(type="array", items=dict(type="integer", maximum=3)))},
)
TOOL = dict(name="f", description="d", parameters=SCHEMA, strict=False)
CALL = dict(id="c", type="function", function=dict(name="f", arguments='{"a": 1}'))
TALK = [
    dict(role="system", content="s"),
    *MESSAGES,
    dict(role="assistant", content=None, tool_calls=[CALL]),
    dict(role="tool", tool_call_id="c", content=[dict(type="text", text="r")]),
]
BODIES = {
    "/v1/completions": dict(
        prompt="x",
        max_tokens=2,
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop=["a"],
        logprobs=1,
        echo=True,
        logit_bias={"5": 1},
        stream=True,
        stream_options=dict(include_usage=True),
        seed=1,
    ),
    "/v1/chat/completions": dict(
        messages=MESSAGES,
        max_tokens=2,
        temperature=0.5,
        n=1,
        stop="a",
        logprobs=True,
        top_logprobs=1,
        stream=False,
        seed=1,
        tools=[],
        tool_choice="none",
        response_format=dict(type="text"),
    ),
    "/v1/messages": dict(
        model="lockstep",
        messages=MESSAGES,
        max_tokens=2,
        system="s",
        stop_sequences=["a"],
        tools=[dict(name="f", input_schema=SCHEMA)],
        tool_choice=dict(type="any"),
    ),
    "/v1/responses": dict(
        input="hello",
        max_output_tokens=2,
        instructions="s",
        stream=False,
        top_logprobs=1,
        tools=[dict(type="function", **TOOL)],
        include=["message.output_text.logprobs"],
    ),
    "/v1/responses/input_tokens": dict(
        input=[
            dict(role="user", content=[dict(type="input_text", text="x")]),
            dict(type="function_call", call_id="c", name="f", arguments="{}"),
            dict(type="function_call_output", call_id="c", output="r"),
        ]
    ),
    "/v1/embeddings": dict(input=["x", "y"], encoding_format="float"),
    "/tokenize": dict(messages=TALK, tools=[dict(type="function", function=TOOL)], add_generation_prompt=True),
    "/detokenize": dict(tokens=[5, 6]),
}
# values that some parser, somewhere, was surprised by
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    5.5,
    -0.0,
    1e308,
    1 << 31,
    1 << 63,
    -(1 << 63),
    1 << 200,
    "",
    "x",
    "\0",
    "\ud800",
    "\N{PILE OF POO}" * 9,
    "-1",
    "NaN",
    "x" * 3000,
    [],
    [None],
    [[]],
    [[[]]],
    {},
    {"a": {}},
    [1, "x"],
    [-1],
    [1 << 40],
    {"": ""},
    {"type": "x"},
    [{}],
    [{"role": 5}],
    ["", ""],
    {"5": "x"},
    {"$ref": "#"},
    [True, False],
]
HEADERS = [
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: 0x10",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip",
    "Connection: upgrade\r\nUpgrade: websocket",
    "Connection: upgrade\r\nUpgrade: h2c",
    "Content-Type: text/xml",
    "Content-Encoding: gzip",
    "Expect: 100-continue",
    "Expect: x",
    "Host:",
    "Host: a\r\nHost: b",
    "Authorization: \xff\xfe",
    "X: \x00",
    "X" * 300 + ": y",
    ": y",
    "Accept-Encoding: br;q=nan",
    "Origin: null",
    "Cookie: " + "a" * 5000,
    "Range: bytes=0-",
    "X-HTTP-Method-Override: DELETE",
]
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLEAR = {200, 400, 403, 404, 405, 408, 413, 415, 417, 429, 431, 503}


@pytest.fixture(scope="module")
def server():
    with running(limits=Limits(body_seconds=0.1, request_seconds=30)) as made:
        yield made


def paths(server):
    """Every route that takes a body."""
    made = [r.path for r in server.server.config.app.routes if isinstance(r, Route) and "POST" in (r.methods or ())]
    assert "/v1/completions" in made and set(made) <= set(BODIES) | {"/v1/messages/count_tokens"}, made
    return made


def damaged_value(rng, value):
    """A JSON value with one place changed."""
    if rng.random() < 0.3 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(ODD)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + 1 :]] * rng.choice([1, 1, 1, 40])
    name = rng.choice(list(value))
    return {**value, name: damaged_value(rng, value[name])}


def damaged_bytes(rng, raw):
    """Bytes with a few changed, cut or doubled."""
    made = bytearray(raw)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(made) or 1)
        cut = slice(at, at + rng.randrange(1, 20))
        made[cut] = rng.choice([b"", bytes([rng.randrange(256)]), made[cut] * 2, b'"', b"}", b"[" * 50, b"\\u"])
    return bytes(made)


def damaged_request(rng, path):
    """A request of one of four kinds: a wrong value, wrong bytes in the body, a wrong header, wrong bytes anywhere."""
    body = BODIES.get(path, BODIES["/v1/messages"])
    kind = rng.choice(["value", "body", "header", "anything"])
    sent = damaged_value(rng, body) if kind == "value" else body
    raw = json.dumps(sent).encode()
    raw = damaged_bytes(rng, raw) if kind == "body" else raw
    whole = head(path=path, Connection="close", Content_Length=len(raw)) + raw
    if kind == "header":
        line, rest = whole.split(b"\r\n", 1)
        whole = line + b"\r\n" + rng.choice(HEADERS).encode("latin-1") + b"\r\n" + rest
    return damaged_bytes(rng, whole) if kind == "anything" else whole


def send(server, raw):
    """(status, seconds, what came); status None where the connection was closed without an answer."""
    began, answer = time.monotonic(), b""
    with connect(server) as connection:
        try:
            connection.sendall(raw)
            while b"\r\n\r\n" not in answer and (piece := connection.recv(1 << 16)):
                answer = (answer + piece).removeprefix(CONTINUE)
        except (BrokenPipeError, ConnectionResetError):
            pass
    words = answer.split()
    return int(words[1]) if len(words) > 1 else None, time.monotonic() - began, answer


def walk(server, seed, rounds, most_seconds=None):
    """Sends damaged requests; returns how often each status came."""
    rng, seen, places = random.Random(seed), Counter(), paths(server)
    for number in range(rounds):
        raw = damaged_request(rng, rng.choice(places))
        status, seconds, answer = send(server, raw)
        assert status in CLEAR or (status is None and b"\r\n\r\n" not in answer), (seed, number, raw, answer)
        # what never comes to its end is answered when its time is up, which is not a stall
        assert not most_seconds or status == 408 or seconds < most_seconds, (seed, number, raw, seconds)
        seen[status] += 1
    return seen


def test_damaged_requests_get_clear_answers(server):
    seen = walk(server, 1, ROUNDS)
    assert seen[200] > ROUNDS // 20 and seen[400] > ROUNDS // 4 and seen[None] < ROUNDS // 10, seen
    wait_until(lambda: server.service.num_open == server.service.num_bytes == 0)


@pytest.mark.skipif(not os.environ.get("LOCKSTEP_SOAK"), reason="LOCKSTEP_SOAK=minutes runs it")
def test_soak_damaged_requests(server):
    deadline, seed, seen = time.monotonic() + 60 * float(os.environ["LOCKSTEP_SOAK"]), time.time_ns(), Counter()
    while time.monotonic() < deadline:
        seed += 1
        seen += walk(server, seed, ROUNDS, most_seconds=1)
    print(dict(seen))
