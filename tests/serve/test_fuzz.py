"""Randomly damaged requests, from fixed seeds: each gets an answer with a clear status, never a 500.

`make fuzz` does the same with new seeds, and also damages connections, templates, grammars and files."""

import random
from collections import Counter

import pytest
from starlette.routing import Route

from lockstep.serve.limits import Limits
from tests.fuzz.bodies import BODIES, damaged_request
from tests.serve.raw import connect
from tests.serve.server import running, wait_until

ROUNDS = 500
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLEAR = {200, 400, 403, 404, 405, 408, 413, 415, 417, 429, 431, 503}


@pytest.fixture(scope="module")
def server():
    with running(limits=Limits(body_seconds=0.1, request_seconds=30)) as made:
        yield made


def paths(server):
    """Every route that takes a body."""
    made = [r.path for r in server.server.config.app.routes if isinstance(r, Route) and "POST" in (r.methods or ())]
    assert "/v1/completions" in made and set(made) <= set(BODIES), made
    return made


def send(server, raw):
    """(status, bytes of the answer); status None where the connection was closed without an answer."""
    answer = b""
    with connect(server) as connection:
        try:
            connection.sendall(raw)
            while b"\r\n\r\n" not in answer and (piece := connection.recv(1 << 16)):
                answer = (answer + piece).removeprefix(CONTINUE)
        except (BrokenPipeError, ConnectionResetError):
            pass
    words = answer.split()
    return int(words[1]) if len(words) > 1 else None, answer


def walk(server, seed, rounds):
    """Sends damaged requests; returns the number of answers by status."""
    rng, seen, places = random.Random(seed), Counter(), paths(server)
    for number in range(rounds):
        raw = damaged_request(rng, rng.choice(places))
        status, answer = send(server, raw)
        assert status in CLEAR or (status is None and b"\r\n\r\n" not in answer), (seed, number, raw, answer)
        seen[status] += 1
    return seen


def test_damaged_requests_get_clear_answers(server):
    seen = walk(server, 1, ROUNDS)
    assert seen[200] > ROUNDS // 20 and seen[400] > ROUNDS // 4 and seen[None] < ROUNDS // 10, seen
    wait_until(lambda: server.service.num_open == server.service.num_bytes == 0)
