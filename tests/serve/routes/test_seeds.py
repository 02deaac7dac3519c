"""The same answer again: `X-Lockstep-Seed` tells the seed before the first token, and an `Idempotency-Key` makes it."""

import contextlib
import gzip
import hashlib
import json
import threading

import httpx
import pytest

from lockstep.receipts.parameters import seed_of
from lockstep.serve.answers.sse import KEEP_ALIVE
from lockstep.serve.limits import Limits
from lockstep.serve.middleware import tenant
from tests.serve.raw import connect, read_all, request
from tests.serve.server import running, wait_until

SEED = "x-lockstep-seed"
HOT = dict(temperature=1.3, ignore_eos=True)
HELLO = [dict(role="user", content="hello")]
REQUESTS = {
    "/v1/completions": dict(prompt=["import os\n", "def f("], max_tokens=8, n=2, **HOT),
    "/v1/chat/completions": dict(messages=HELLO, max_tokens=8, n=2, **HOT),
    "/v1/responses": dict(input="hello", max_output_tokens=8, **HOT),
    "/v1/messages": dict(messages=HELLO, max_tokens=8, **HOT),
}
by_route = pytest.mark.parametrize("path", REQUESTS)


def post(server, path, key=None, api_key=None, **body):
    headers = ({"Idempotency-Key": key} if key else {}) | ({"x-api-key": api_key} if api_key else {})
    made = httpx.post(f"{server.url}{path}", json=body, headers=headers)
    assert made.status_code == 200, made.text
    return made


def texts(made):
    """The texts of a whole answer, in order."""
    if "choices" in made:
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in made["choices"]]
    return [part["text"] for item in made.get("output", [made]) for part in item["content"]]


def streamed(text):
    """The texts of a stream, in order."""
    found = {}
    for event in [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]:
        for choice in event.get("choices", ()):
            more = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + more
        if event.get("type") in ("response.output_text.delta", "content_block_delta"):
            delta = event["delta"]
            found[0] = found.get(0, "") + (delta if isinstance(delta, str) else delta["text"])
    return [text for _, text in sorted(found.items())]


# ---------------------------------------------------------------- the header


@by_route
@pytest.mark.parametrize("seed", [None, -1, -5])
def test_a_request_with_the_seed_of_the_header_has_the_same_answer(server, path, seed):
    first = post(server, path, seed=seed, **REQUESTS[path])
    told = int(first.headers[SEED])
    assert told == seed if seed == -5 else 0 <= told < 1 << 53
    again = post(server, path, **REQUESTS[path] | dict(seed=told))
    stream = post(server, path, stream=True, **REQUESTS[path] | dict(seed=told))
    assert texts(first.json()) == texts(again.json()) == streamed(stream.text)
    assert [made.headers[SEED] for made in (again, stream)] == [str(told)] * 2
    assert len(set(texts(first.json()))) == len(texts(first.json()))


@by_route
def test_without_a_seed_each_request_has_one_of_its_own(server, path):
    made = [post(server, path, stream=stream, **REQUESTS[path]) for stream in (False, True, False, True)]
    assert len({each.headers[SEED] for each in made}) == 4
    assert len({*map(tuple, (texts(made[0].json()), streamed(made[1].text)))}) == 2


def test_where_nothing_is_drawn_the_seed_is_zero(server):
    made = [post(server, "/v1/completions", key=key, prompt="x", max_tokens=2, temperature=0) for key in (None, "a")]
    assert [each.headers[SEED] for each in made] == ["0", "0"]


def test_what_generates_nothing_and_what_is_refused_has_no_seed(server):
    asked = [
        ("/v1/completions", dict(prompt="x", n=0)),
        ("/v1/completions", dict(prompt="x" * 9000)),
        ("/v1/embeddings", dict(input="x")),
        ("/tokenize", dict(prompt="x")),
    ]
    assert all(SEED not in httpx.post(server.url + path, json=body).headers for path, body in asked)


def test_a_nonce_goes_before_an_idempotency_key(server):
    ids = [server.service.tokenizer.encode(prompt) for prompt in ("import os\n", "def f(")]
    body = dict(max_tokens=8, receipt=dict(nonce="abc"), **HOT)
    one = post(server, "/v1/completions", key="a", prompt=ids[0], **body)
    assert int(one.headers[SEED]) == seed_of("abc", ids[0])
    # several prompts have seeds of their own, which no single number gives; the request repeats as it is
    several = [post(server, "/v1/completions", key=key, prompt=ids, **body) for key in ("a", "b")]
    assert not any(SEED in made.headers for made in several)
    assert texts(several[0].json()) == texts(several[1].json())
    assert texts(several[0].json())[0] == texts(one.json())[0]
    given = post(server, "/v1/completions", key="a", prompt=ids, seed=3, **body)
    assert given.headers[SEED] == "3"


def test_pages_that_may_call_the_server_can_read_the_seed():
    with running(cors_origins=["https://their.site"]) as made:
        body = dict(prompt="x", max_tokens=1)
        got = httpx.post(f"{made.url}/v1/completions", json=body, headers={"Origin": "https://their.site"})
        assert "x-lockstep-seed" in got.headers["access-control-expose-headers"].lower() and SEED in got.headers


# ---------------------------------------------------------------- Idempotency-Key


def seed_by_the_document(key, owner, raw):
    parts = b"".join(hashlib.sha256(part).digest() for part in (key.encode(), owner.encode(), raw))
    digest = hashlib.sha256(b"lockstep idempotency" + parts).digest()
    return int.from_bytes(digest[:8], "little") % 2**53


@by_route
def test_a_retry_with_the_same_key_has_the_same_answer(server, path):
    made = [post(server, path, key=key, **REQUESTS[path]) for key in ("a", "a", "b")]
    assert texts(made[0].json()) == texts(made[1].json()) != texts(made[2].json())
    raw = made[0].request.content
    assert [int(each.headers[SEED]) for each in made] == [seed_by_the_document(key, "", raw) for key in "aab"]


def test_long_and_packed_bodies_give_the_seed_too(server):
    raw = json.dumps(dict(prompt=[5] * 900, max_tokens=1, temperature=1)).encode() + b" " * 5000
    headers = {"Idempotency-Key": "k" * 255}
    plain = httpx.post(f"{server.url}/v1/completions", content=raw, headers=headers)
    packed = httpx.post(
        f"{server.url}/v1/completions", content=gzip.compress(raw), headers=headers | {"Content-Encoding": "gzip"}
    )
    assert int(plain.headers[SEED]) == int(packed.headers[SEED]) == seed_by_the_document("k" * 255, "", raw)


def test_owners_of_other_api_keys_get_other_seeds(server):
    with running(api_keys=["alice", "bob"]) as made:
        got = [
            post(made, "/v1/completions", "k", name, prompt="x", max_tokens=1, temperature=1)
            for name in ("alice", "bob")
        ]
        expected = [seed_by_the_document("k", tenant(name), got[0].request.content) for name in (b"alice", b"bob")]
        assert [int(each.headers[SEED]) for each in got] == expected


@by_route
@pytest.mark.parametrize("key", [b"", b"k" * 256, b"caf\xe9", b"a\tb"])
def test_what_is_no_key_is_refused_by_name(server, path, key):
    for seed in (None, 5):
        body = json.dumps(REQUESTS[path] | dict(seed=seed)).encode()
        got = httpx.post(server.url + path, content=body, headers=[(b"Idempotency-Key", key)])
        message = got.json()["error"]["message"]
        assert got.status_code == 400 and SEED not in got.headers
        assert message.startswith("Idempotency-Key: expected 1 to 255 printable ASCII characters, got ")
    twice = httpx.post(server.url + path, content=body, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "a")])
    assert twice.status_code == 400 and "expected one such header, got 2" in twice.text


# ---------------------------------------------------------------- streams that wait


@contextlib.contextmanager
def stuck():
    """A server that runs one sequence at a time and has one that is in the middle of its answer; its engine makes no
    step until the event is set."""
    go = threading.Event()
    with running(max_requests=1, limits=Limits(keep_alive_seconds=0.05)) as made:
        engine = made.service.engine.engine
        step = engine.step
        engine.step = lambda: go.wait(60) and step()
        try:
            yield made, go
        finally:
            go.set()


def until(connection, text, count):
    got = b""
    while got.count(text) < count:
        piece = connection.recv(1 << 16)
        assert piece, got
        got += piece
    return got


@by_route
def test_a_stream_that_waits_has_its_seed_and_gets_comments(path):
    """Both for an engine that is stuck and behind another request in the queue."""
    with stuck() as (made, go):
        raw = request(REQUESTS[path] | dict(stream=True), Connection="close").replace(b"/v1/completions", path.encode())
        with connect(made) as running_one, connect(made) as waiting:
            for connection in (running_one, waiting):
                connection.sendall(raw)
            got = [until(connection, KEEP_ALIVE, 3) for connection in (running_one, waiting)]
            assert all(each.startswith(b"HTTP/1.1 200") for each in got)
            seeds = [int(each.split(b"x-lockstep-seed: ")[1].split(b"\r\n")[0]) for each in got]
            assert not any(seq.output_ids for each in list(made.service.generations) for seq in each.requests)
            go.set()
            rest = [read_all(connection) for connection in (running_one, waiting)]
        for seed, before, after in zip(seeds, got, rest, strict=True):
            again = post(made, path, **REQUESTS[path] | dict(seed=seed))
            assert texts(again.json()) == streamed(lines((before + after).partition(b"\r\n\r\n")[2]))


def lines(chunked):
    """The text of an HTTP body in chunks."""
    found = b""
    while chunked:
        size, _, chunked = chunked.lstrip(b"\r\n").partition(b"\r\n")
        found, chunked = found + chunked[: int(size or b"0", 16)], chunked[int(size or b"0", 16) :]
    return found.decode()


def test_errors_before_anything_is_generated_keep_their_statuses(server):
    """Also where a stream is asked for: its headers go out once the request is admitted, and not before."""
    asked = [
        (400, dict(prompt="x", n=0)),
        (400, dict(prompt=[5] * 2000)),
        (400, dict(prompt="x", guided_regex="(")),
        (400, dict(prompt="x", temperature=0, continue_from=[1 << 30])),
        (404, dict(prompt="x", model="other")),
    ]
    found = [httpx.post(f"{server.url}/v1/completions", json=body | dict(stream=True)) for _, body in asked]
    assert [each.status_code for each in found] == [status for status, _ in asked]
    assert not any(SEED in each.headers for each in found)
    with stuck() as (made, _), connect(made) as waiting:
        waiting.sendall(request(dict(prompt=["x"] * 15, n=16, stream=True, max_tokens=1)))
        wait_until(lambda: made.service.num_sequences == 240)
        full = httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x", n=64, stream=True))
        assert full.status_code == 429 and SEED not in full.headers
