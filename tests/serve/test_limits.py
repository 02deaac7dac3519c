"""Requests beyond the limits (sizes, encodings, slow clients) get clear answers."""

import gzip
import json
import socket
import time
from dataclasses import replace

import pytest
from pydantic import Field

from lockstep.serve.errors import ApiError
from lockstep.serve.fields.body import Fields, Whole, check, parse
from lockstep.serve.limits import Limits
from tests.serve.raw import connect, exchange, head, read_all, request
from tests.serve.server import running, wait_until

SMALL = Limits(
    max_body_bytes=100_000,
    max_header_bytes=8192,
    max_connections=20,
    spare_connections=3,
    body_seconds=0.5,
    max_depth=10,
    max_pending_bytes=150_000,
)
CLOSE = dict(Connection="close")


@pytest.fixture(scope="module")
def small():
    with running(limits=SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def patient():
    """A server with a long time limit for bodies, so that a slow machine fails no test."""
    with running(limits=replace(SMALL, body_seconds=60)) as made:
        yield made


def refused(found, status, says):
    assert found[0] == status, found
    error = json.loads(found[1])["error"]
    assert says in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body, says",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"5", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'{"prompt": NaN}', "NaN is not"),
        (b'{"prompt": "x", "temperature": Infinity}', "Infinity is not"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not"),
        (b'{"prompt": "x", "temperature": 1e999}', "too large for a number"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "lone surrogate, U+D800"),
        (b'{"\\udfff": 1}', "lone surrogate, U+DFFF"),
        (b'{"prompt": "x", "stop": ["\\uD83D"]}', "lone surrogate"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
        (b'{"a":' * 11 + b"1" + b"}" * 11, "more than 10 deep"),
        (b"[" * 20000 + b"]" * 20000, "deep"),
        (b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}", "deep"),
    ],
    ids=lambda v: str(v[:30]),
)
def test_a_body_that_is_not_a_sound_object_is_refused(small, body, says):
    refused(exchange(small, request(body, **CLOSE)), 400, says)


def test_a_pair_of_surrogates_is_fine(small):
    assert exchange(small, request(b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}', **CLOSE))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "max_tokens": -1, "max_tokens": 1}',
        b'{"a": {"max_tokens": 1, "b": 2, "max\\u005ftokens": 1}}',
        b'{"messages": [{"role": "user", "max_tokens": 1, "max_tokens": 1}]}',
    ],
    ids=str,
)
def test_a_field_that_is_there_twice_is_refused(small, body):
    """Otherwise a proxy that reads the first value and a server that reads the last would see different requests."""
    refused(exchange(small, request(body, **CLOSE)), 400, 'the field "max_tokens" twice')


def test_a_body_that_is_too_large_is_refused_before_it_is_read(small):
    refused(exchange(small, head(Content_Length=10**9, **CLOSE)), 413, "larger than 100000 bytes")
    refused(exchange(small, head(Content_Length="9" * 19, **CLOSE)), 413, "larger than 100000 bytes")
    refused(exchange(small, request(b"x" * 100_001, **CLOSE)), 413, "larger than 100000 bytes")
    pieces = b"".join(b"1000\r\n" + b"x" * 4096 + b"\r\n" for _ in range(25))
    refused(exchange(small, head(Transfer_Encoding="chunked", **CLOSE) + pieces), 413, "larger than 100000 bytes")


def test_bodies_of_many_requests_are_bounded_together(patient):
    half = head(Content_Length=99_000) + b"x" * 90_000
    with connect(patient) as first:
        first.sendall(half)
        wait_until(lambda: patient.service.num_bytes == 90_000)
        refused(exchange(patient, head(Content_Length=99_000, **CLOSE) + b"x" * 90_000), 429, "too much memory")
    wait_until(lambda: patient.service.num_bytes == 0)
    assert exchange(patient, request(dict(prompt="x", max_tokens=1), **CLOSE))[0] == 200


def test_a_gzip_body_is_unpacked(small):
    body = json.dumps(dict(prompt="x", max_tokens=1)).encode()
    packed = gzip.compress(body)
    for coding in ("gzip", "GZIP", "x-gzip", "identity, gzip"):
        assert exchange(small, request(packed, Content_Encoding=coding, **CLOSE))[0] == 200
    assert exchange(small, request(body, Content_Encoding="identity", **CLOSE))[0] == 200
    assert (
        exchange(small, request(gzip.compress(body[:9]) + gzip.compress(body[9:]), Content_Encoding="gzip", **CLOSE))[0]
        == 200
    )
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in packed) + b"0\r\n\r\n"
    assert exchange(small, head(Transfer_Encoding="chunked", Content_Encoding="gzip", **CLOSE) + chunks)[0] == 200
    two = request(packed, Content_Encoding="gzip") + request(body, **CLOSE)
    with connect(small) as connection:
        connection.sendall(two)
        assert read_all(connection).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "raw, coding, status, says",
    [
        (gzip.compress(b" " * 50_000_000, mtime=0), "gzip", 413, "larger than 100000 bytes"),
        (gzip.compress(b"", mtime=0) * 6000, "gzip", 413, "larger than 100000 bytes"),
        (gzip.compress(b"{", mtime=0)[:-9], "gzip", 400, "ends too soon"),
        (b"", "gzip", 400, "ends too soon"),
        (b"{}", "gzip", 400, "not valid gzip"),
        (gzip.compress(b"{}", mtime=0) + b"x", "gzip", 400, "not valid gzip"),
        (b"{}", "br", 415, "expected gzip or none, got br"),
        (b"{}", "zstd", 415, "got zstd"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "gzip, gzip", 415, "got gzip, gzip"),
        (b"{}", "x" * 500, 415, "got xxx"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_packed_body_is_bounded_and_other_encodings_are_refused(small, raw, coding, status, says):
    refused(exchange(small, request(raw, Content_Encoding=coding, **CLOSE)), status, says)
    wait_until(lambda: small.service.num_bytes == small.service.num_open == 0)


def test_a_body_in_many_chunks_of_one_byte_is_read(small):
    body = json.dumps(dict(prompt="x" * 8000, max_tokens=1)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    refused(exchange(small, head(Transfer_Encoding="chunked", **CLOSE) + chunks), 400, "context of 1024")


@pytest.mark.parametrize(
    "raw",
    [
        head(X="y" * 9000),
        head(path="/" + "a" * 9000),
        head(**{f"X_{i}": "y" for i in range(400)}),
        b"POST / HTTP/1.1\r\nX: " + b"y" * 20_000,
        b"GET /" + b"a" * 20_000,
        head(Transfer_Encoding="chunked") + b"1\r\n{\r\n0\r\nX: " + b"y" * 900_000,
        head(Transfer_Encoding="chunked") + b"1;" + b"e" * 900_000,
    ],
    ids=lambda raw: str(raw[:20]),
)
def test_heads_and_what_is_around_bodies_are_bounded(small, raw):
    found = exchange(small, raw)
    if len(raw) < 100_000 or found[0] is not None:  # a closed connection may take its answer with it
        refused(found, 431, "larger than 8192 bytes")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\n\r\n",
        head(Content_Length=-5),
        head(Content_Length="1e3"),
        head(Content_Length="5, 6"),
        head(Transfer_Encoding="chunked") + b"-1\r\nx\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=lambda raw: str(raw[:40]),
)
def test_what_is_not_http_is_answered_and_closed(small, raw):
    status, body = exchange(small, raw)
    assert status == 400 and json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"POST /v1/comp",
        head(Content_Length=50),
        head(Content_Length=50) + b"{",
        head(Transfer_Encoding="chunked") + b"5\r\n{",
    ],
    ids=lambda raw: str(raw[:40]),
)
def test_what_does_not_arrive_in_time_is_answered(small, raw):
    began = time.monotonic()
    with connect(small) as connection:
        connection.sendall(raw)
        answer = read_all(connection) if b"\r\n\r\n" not in raw else connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - began >= 0.4


def test_the_rest_of_a_refused_body_may_not_trickle_for_ever(small):
    with connect(small) as connection:
        connection.sendall(head(Content_Length=10**7))
        answer = connection.recv(1 << 16)
        connection.sendall(b"x" * 1000)
        answer += read_all(connection)  # the server closes it before the whole answer was sent
    assert answer.startswith(b"HTTP/1.1 413") and answer.count(b"HTTP/1.1") == 1


def test_a_client_that_does_not_read_is_dropped(small):
    whole = request(dict(prompt="x" * 500, n=60, max_tokens=1, logprobs=20, echo=True))
    with connect(small) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(whole * 4)  # more bytes than the buffers of sockets hold
        wait_until(lambda: any(c.flow.write_paused for c in small.server.server_state.connections))
        wait_until(lambda: not small.server.server_state.connections)
    wait_until(lambda: not small.service.num_open)


def test_too_many_connections_are_answered_and_the_others_go_on(patient):
    idle = [connect(patient) for _ in range(20)]
    wait_until(lambda: len(patient.server.server_state.connections) >= 20)
    found = exchange(patient, request(dict(prompt="x", max_tokens=1)))
    refused(found, 503, "more than 20 connections")
    for each in idle:
        each.close()
    wait_until(lambda: not patient.server.server_state.connections)
    assert exchange(patient, request(dict(prompt="x", max_tokens=1), **CLOSE))[0] == 200


def test_requests_in_one_go_are_answered_in_order(small):
    bodies = [dict(prompt="x", max_tokens=n) for n in (3, 1, 2)]
    with connect(small) as connection:
        connection.sendall(b"".join(map(request, bodies[:2])) + request(bodies[2], **CLOSE))
        answer = read_all(connection)
    found = [
        json.loads(part.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"]
        for part in answer.split(b"HTTP/1.1 200")[1:]
    ]
    assert len(found) == 3 and all(count <= body["max_tokens"] for count, body in zip(found, bodies, strict=True))


def test_expect_continue_is_answered(small):
    body = json.dumps(dict(prompt="x", max_tokens=1)).encode()
    with connect(small) as connection:
        connection.sendall(head(Content_Length=len(body), Expect="100-continue", **CLOSE))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_limits_are_positive_numbers():
    for value in (0, -1, "5", None, True, float("nan")):
        with pytest.raises(ValueError, match="max_queued: expected a positive number"):
            Limits(max_queued=value)


class Some(Fields):
    """Fields for the test below."""

    count: Whole | None = None
    words: list[str] = Field(default_factory=list)


@pytest.mark.parametrize(
    "value, says",
    [
        (dict(count="5"), 'count: expected an integer, got "5"'),
        (dict(count=5.5), "count: expected an integer, got 5.5"),
        (dict(count=True), "count: expected an integer, got true"),
        (dict(words=["a", 5]), "words[1]: expected a string, got 5"),
        (dict(words="abc"), 'words: expected an array, got "abc"'),
        (dict(count=["x"] * 100), "count: expected an integer, got an array of 100"),
        (dict(count="x" * 500), "... (502 characters)"),
    ],
    ids=str,
)
def test_errors_name_the_field_what_was_got_and_what_is_allowed(value, says):
    with pytest.raises(ApiError) as caught:
        check(Some, value)
    assert says in caught.value.message and len(caught.value.message) < 200


def test_depth_is_counted_as_it_looks():
    assert parse(b'{"a": [[1]]}', Limits(max_depth=3)) == {"a": [[1]]}
    with pytest.raises(ApiError, match="more than 2 deep"):
        parse(b'{"a": [[1]]}', Limits(max_depth=2))
