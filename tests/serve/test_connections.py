"""Invalid headers, clients that close their half of the connection, too many connections, and terminals that close."""

import json
import resource
import signal
import socket
import time

import httpx
import pytest

from lockstep.serve.connections import Connections
from lockstep.serve.limits import Limits
from lockstep.serve.request_target import name_of
from lockstep.serve.server import OWN_FILES, raise_open_file_limit
from tests.serve.program import program
from tests.serve.raw import connect, exchange, head, read_all, request
from tests.serve.server import running, wait_until
from tests.serve.test_traffic import read_until_started

CLOSE = dict(Connection="close")
FEW = Limits(max_connections=8, max_address_connections=5, spare_connections=2, body_seconds=20)


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize(
    "first, hosts, says",
    [
        (b"CONNECT evil.example:443 HTTP/1.1", [b"evil.example:443"], "no proxy"),
        (b"CONNECT evil.example:443 HTTP/1.0", [], "no proxy"),
        (b"GET http://[::1/ HTTP/1.1", [b"localhost"], "neither"),
        (b"GET http://localhost HTTP/1.1", [b"localhost"], "no path"),
        (b"GET http:/// HTTP/1.1", [b"localhost"], ""),
        (b"GET http://evil.example/ HTTP/1.1", [b"localhost"], "different hosts"),
        (b"GET abc HTTP/1.1", [b"localhost"], ""),
        (b"GET /health HTTP/1.1", [], "one Host header, got 0"),
        (b"GET /health HTTP/1.1", [b"localhost", b"localhost"], "one Host header, got 2"),
        (b"GET /health HTTP/1.0", [b"localhost", b"evil.example"], "one Host header, got 2"),
    ],
)
def test_a_head_that_means_nothing_is_a_400_and_no_traceback(server, first, hosts, says, caplog):
    status, body = exchange(server, b"\r\n".join([first, *[b"Host: " + host for host in hosts], b"", b""]))
    assert status == 400 and says in json.loads(body)["error"]["message"] and not caplog.records


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/1.0\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost:1/health HTTP/1.1\r\nHost: LOCALHOST\r\nConnection: close\r\n\r\n",
    ],
)
def test_unusual_heads_that_mean_something(server, raw):
    with connect(server) as connection:
        connection.sendall(raw)
        assert connection.recv(100).split()[1] in (b"200", b"404")


@pytest.mark.parametrize(
    "expected, status",
    [
        ("x", 417),
        ("100-continue, x", 417),
        ("100-continue", 200),
        ("100-Continue", 200),
        ("", 200),
    ],
)
def test_an_expectation_that_is_not_met_is_told(server, expected, status):
    found, body = exchange(server, head("/health", "GET", Expect=expected, **CLOSE))
    assert found == status and (status == 200 or json.loads(body)["error"]["code"] == "unknown_expectation")
    assert exchange(server, f"GET /health HTTP/1.0\r\nExpect: {expected}\r\n\r\n".encode())[0] == 200


def test_names_in_host_headers():
    for host, name in {
        b"A.b:80": "a.b",
        b"[::1]:80": "::1",
        b"::1": "::1",
        b" x. ": "x",
        b"": "",
        b"a:b:c": "a:b:c",
        b"x:": "x",
        b"[::1]x": "[::1]x".strip("[]"),
    }.items():
        assert name_of(host) == name


# ---------------------------------------------------------------- clients that send no more


@pytest.mark.parametrize("fields", [dict(), dict(stream=True), dict(stream=True, n=3)], ids=str)
def test_a_client_that_closes_its_half_gets_the_whole_answer(server, fields):
    asked = dict(prompt="def f(", max_tokens=60, temperature=0, ignore_eos=True, **fields)
    whole = exchange(server, request(asked, **CLOSE))[1]
    with connect(server) as connection:
        connection.sendall(request(asked) * 2)
        connection.shutdown(socket.SHUT_WR)
        found = read_all(connection)
    parts = [part for part in found.split(b"HTTP/1.1 200")[1:]]
    assert len(parts) == 2, found[:200]
    ends = b"[DONE]" if fields else b'"finish_reason":"length"'
    assert all(part.count(ends) == whole.count(ends) for part in parts)


@pytest.mark.parametrize("raw", [b"", b"GET /heal", head(Content_Length=50), head(Content_Length=50) + b"{"], ids=str)
def test_a_client_that_ends_within_a_request_has_left(server, raw):
    with connect(server) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(20)  # a server that waits for the rest of the body would take 30
        assert read_all(connection) == b""


@pytest.mark.alone
@pytest.mark.parametrize("fields", [dict(), dict(stream=True)], ids=str)
def test_a_client_that_closes_altogether_is_noticed_soon(fields):
    """A client that closed the whole connection looks as if it closed its half, until the server writes to it."""
    with running(max_context=4096) as made:
        engine = made.service.engine.engine
        step = engine.step
        engine.step = lambda: time.sleep(0.02) or step()
        with connect(made) as connection:
            connection.sendall(request(dict(prompt="x", max_tokens=4000, ignore_eos=True, **fields)))
            wait_until(lambda: engine.has_work)
        wait_until(lambda: not engine.has_work, 40)  # all tokens would take 80 seconds
        wait_until(lambda: made.service.metrics.cancelled == 1)


# ---------------------------------------------------------------- too many


def test_health_is_answered_whoever_holds_connections():
    """Half-sent requests from one address, far more than are allowed, are sent again as they are refused."""
    with running(limits=FEW) as made:
        for _ in range(3):
            held = [connect(made) for _ in range(20)]
            for each in held:
                each.sendall(b"GET /heal")
            for path in ("/health", "/ready"):
                began = time.monotonic()
                assert httpx.get(made.url + path).status_code == 200
                assert time.monotonic() - began < FEW.body_seconds / 2, "it waited for one that is held"
            status, body = exchange(made, request(dict(prompt="x")))
            assert status == 503 and json.loads(body)["error"]["code"] == "connections_full"
            wait_until(lambda: len(made.server.server_state.connections) <= 8, FEW.body_seconds / 2)
            for each in held:
                each.close()
        wait_until(lambda: not made.server.server_state.connections)
        assert exchange(made, request(dict(prompt="x", max_tokens=1), **CLOSE))[0] == 200


def test_health_that_came_before_a_crowd_is_answered():
    """All connections are accepted before any of them is read, as on a busy machine."""
    with running(limits=FEW) as made:
        exchange(made, head("/health", "GET", **CLOSE))
        loop = next(iter(made.server.servers)).get_loop()
        held = [connect(made) for _ in range(5)]
        for each in held:
            each.sendall(b"GET /heal")
        wait_until(lambda: len(made.server.server_state.connections) == 5)
        loop.call_soon_threadsafe(time.sleep, 0.5)
        asking = connect(made)
        asking.sendall(head("/health", "GET", **CLOSE))
        held += [connect(made) for _ in range(20)]
        assert read_all(asking).startswith(b"HTTP/1.1 200")
        wait_until(lambda: len(made.server.server_state.connections) <= 7)
        for each in [asking, *held]:
            each.close()


class Held:
    """A connection of the test below."""

    out = False

    def crowded_out(self):
        self.out = True


def test_connections_are_counted_by_address_and_in_all():
    held = Connections(FEW)
    ones = [Held() for _ in range(14)]
    assert [held.enter(one, "10.0.0.1") for one in ones[:6]] == [True] * 5 + [False]
    assert [held.enter(one, "::ffff:10.0.0.1") for one in ones[6:7]] == [False]
    assert [held.enter(one, f"2001:db8::{i}") for i, one in enumerate(ones[7:10])] == [True] * 3
    assert not held.enter(ones[10], "10.0.0.2") and [one.out for one in ones[5:7]] == [True, False]
    held.leave(ones[0])
    held.leave(ones[0])
    assert held.enter(ones[11], "10.0.0.1") and not held.enter(ones[12], "10.0.0.2")
    held.leave(ones[7])
    assert not held.enter(ones[13], "10.0.0.1") and held.enter(Held(), "2001:db8::ffff:1")
    for one in ones:
        held.leave(one)
    assert len(held) == 1


# ---------------------------------------------------------------- terminals that close


@pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="nohup: the server ignores it as well")
def test_sighup_drains_however_often_it_comes():
    with program("--max-requests", 8) as made:
        readers = read_until_started(made.url)
        made.signal(signal.SIGHUP)
        made.signal(signal.SIGHUP)
        wait_until(lambda: httpx.get(f"{made.url}/ready").json()["status"] == "draining")
        for reader in readers:
            reader.join(120)
        assert all(r.text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in r.text for r in readers)
        assert made.process.wait(60) == 0


# ---------------------------------------------------------------- files


def test_a_process_may_open_a_file_for_each_connection():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        raise_open_file_limit(Limits(max_connections=300, spare_connections=4))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (304 + OWN_FILES, hard)
        raise_open_file_limit(Limits(max_connections=8))  # it is never lowered
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 304 + OWN_FILES
        if hard != resource.RLIM_INFINITY:
            with pytest.raises(ValueError, match=rf"{hard} connections need {hard + 272} open files, .* \(ulimit -n\)"):
                raise_open_file_limit(Limits(max_connections=hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
