"""Too many clients, clients that leave, and a server that ends: everybody is answered, and all memory comes back.

LOCKSTEP_SOAK=minutes overloads a server for so long, with memory and times of refusals checked (`make soak`).
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter

import httpx
import numpy as np
import pytest

from lockstep.serve.limits import Limits
from tests.serve.program import program
from tests.serve.server import running, wait_until
from tests.serve.visitors import visits

SMALL = ("--max-requests", 4, "--max-queued", 8, "--max-queued-tokens", 2000, "--max-context", 1024)
LONG = dict(prompt="x", max_tokens=3500, ignore_eos=True, stream=True)
REFUSAL_SECONDS = 0.05
READERS = 4


@pytest.fixture(scope="module")
def small():
    with program(*SMALL) as made:
        yield made


def answer(server):
    return httpx.post(
        f"{server.url}/v1/completions",
        timeout=120,
        json=dict(prompt="def read_lines(path):\n", max_tokens=40, temperature=0, logprobs=1),
    ).json()["choices"]


# ---------------------------------------------------------------- overload


def test_under_overload_everybody_is_answered(small):
    before = answer(small)
    statuses, rate = Counter(), 250
    while not statuses[429]:  # a faster machine needs more requests
        found = visits("overload", small.port, 4, rate, 1)
        statuses += Counter(status for status, *_ in found)
        rate *= 4
        small.check_alive()
        assert all(whole for _, _, whole, _ in found), [f for f in found if not f[2]][:3]
    assert set(statuses) == {200, 429}, statuses
    wait_until(small.is_idle)
    refused = {name: n for name, n in small.metrics().items() if name[0] == "refused_requests_total"}
    assert sum(refused.values()) == statuses[429]
    assert answer(small) == before


@pytest.mark.skipif(not os.environ.get("LOCKSTEP_SOAK"), reason="LOCKSTEP_SOAK=minutes runs it")
def test_soak_overload_keeps_memory_flat_and_refusals_fast():
    deadline, memory, times = time.monotonic() + 60 * float(os.environ["LOCKSTEP_SOAK"]), [], []
    with program(*SMALL, "--no-prefix-cache") as made:  # the prefix cache's memory is bounded, too, but fills slowly
        while time.monotonic() < deadline:
            found = visits("overload", made.port, 20, 250, len(memory))
            made.check_alive()
            assert all(whole for _, _, whole, _ in found), [f for f in found if not f[2]][:3]
            times += [seconds for status, seconds, *_ in found if status == 429]
            memory.append(made.rss_mb)
        wait_until(made.is_idle)
    print(f"{len(times)} refusals, p99 {np.percentile(times, 99) * 1000:.1f} ms; MB resident: {memory}")
    assert np.percentile(times, 99) < REFUSAL_SECONDS
    assert max(memory) < 1.05 * memory[0]


def test_the_queue_is_bounded_by_sequences_and_by_tokens():
    hold = threading.Event()
    with running(max_requests=2, limits=Limits(max_queued=4, max_queued_tokens=1000)) as made:
        step = made.service.engine.engine.step
        made.service.engine.engine.step = lambda: hold.wait(60) and step()
        answers = []

        def post(**fields):
            got = httpx.post(f"{made.url}/v1/completions", timeout=60, json={"max_tokens": 2, **fields})
            answers.append(got)
            return got

        def later(**fields):
            thread = threading.Thread(target=post, kwargs=fields)
            thread.start()
            return thread

        alone = [later(prompt=[5] * 900, n=2)]  # more tokens than may wait, which a request may have that is alone
        wait_until(lambda: made.service.num_queued_tokens == 1800)
        full = post(prompt="x")
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_tokens_full"
        assert full.json()["error"]["type"] == "rate_limit_error" and int(full.headers["retry-after"]) >= 1
        hold.set()
        alone[0].join(60)
        hold.clear()
        more = [later(prompt="x", n=3), later(prompt=["x", "y"])]
        wait_until(lambda: made.service.num_sequences == 5)
        full = post(prompt="x", n=2)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        more.append(later(prompt="x"))
        wait_until(lambda: made.service.num_sequences == 6)
        ready = httpx.get(f"{made.url}/ready")
        assert ready.json() == dict(status="full", reason="6 sequences are being answered or wait")
        assert (ready.status_code, int(ready.headers["retry-after"]) >= 1) == (503, True)
        assert post(prompt="x").json()["error"]["code"] == "queue_full"
        assert made.service.metrics.refused == {"queue_tokens_full": 1, "queue_full": 2}
        hold.set()
        for thread in more:
            thread.join(60)
        assert sorted(a.status_code for a in answers) == [200] * 4 + [429] * 3
        served = made.service  # a client may have read all before the server is through
        wait_until(lambda: (served.num_sequences, served.num_queued_tokens, served.num_open) == (0, 0, 0))


def test_an_answer_that_takes_too_long_is_ended():
    with running(max_requests=2, max_context=4096, limits=Limits(request_seconds=0.3)) as made:
        engine = made.service.engine.engine
        step = engine.step
        engine.step = lambda: time.sleep(0.01) or step()
        got = httpx.post(f"{made.url}/v1/completions", json=LONG | dict(stream=False), timeout=60)
        assert got.status_code == 504 and got.json()["error"]["code"] == "timeout"
        got = httpx.post(f"{made.url}/v1/completions", json=LONG, timeout=60)
        if got.status_code == 200:  # the stream had begun
            *_, error, done = got.text.strip().split("\n\n")
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout" and done == "data: [DONE]"
        else:
            assert got.status_code == 504 and got.json()["error"]["code"] == "timeout"
        wait_until(lambda: not engine.has_work)


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize(
    "count",
    [
        150,
        pytest.param(
            1000,
            marks=pytest.mark.skipif(not os.environ.get("LOCKSTEP_SOAK"), reason="LOCKSTEP_SOAK=minutes runs it"),
            id="1000 soak",
        ),
    ],
)
def test_clients_that_leave_give_everything_back(small, count):
    before, counted = answer(small), small.metrics()[("cancelled_requests_total",)]
    seen = visits("leave", small.port, count, 7)
    assert {"sending", "waiting", "reading"} <= set(seen) and sum(seen.values()) == count, seen
    wait_until(small.is_idle)
    assert small.metrics()[("cancelled_requests_total",)] > counted
    assert answer(small) == before


def test_a_neighbour_does_not_notice_who_leaves(small):
    alone = [answer(small) for _ in range(2)]
    found, thread = [], threading.Thread(target=lambda: found.append(visits("leave", small.port, 40, 3)))
    thread.start()
    beside = []
    while thread.is_alive():
        got = answer_or_refusal(small)
        beside += [got] if got else []
    thread.join()
    assert alone[0] == alone[1] and beside and all(each == alone[0] for each in beside)


def answer_or_refusal(server):
    got = httpx.post(
        f"{server.url}/v1/completions",
        timeout=120,
        json=dict(prompt="def read_lines(path):\n", max_tokens=40, temperature=0, logprobs=1),
    )
    return got.json()["choices"] if got.status_code == 200 else None


# ---------------------------------------------------------------- the end


class Reader(threading.Thread):
    """A client that reads one stream. text: the received text; started: set with the first bytes."""

    def __init__(self, url, sent):
        super().__init__()
        self.url, self.sent, self.text, self.started = url, sent, "", threading.Event()
        self.start()

    def run(self):
        with httpx.stream("POST", f"{self.url}/v1/completions", json=self.sent, timeout=120) as got:
            for piece in got.iter_text():
                self.text += piece
                self.started.set()
        self.started.set()


def read_until_started(url, **fields):
    readers = [Reader(url, LONG | fields) for _ in range(READERS)]
    for reader in readers:
        assert reader.started.wait(120)
    return readers


@contextlib.contextmanager
def answering(**limits):
    """A Running server, the readers of streams that have begun, and the event that lets these streams end."""
    go = threading.Event()
    with running(max_requests=32, limits=Limits(**limits)) as made:
        engine, generations = made.service.engine.engine, made.service.generations
        step = engine.step

        def step_or_wait():
            wait_until(
                lambda: (
                    (len(generations) == READERS and all(generation.requests for generation in list(generations)))
                    or go.is_set()
                )
            )
            if all(request.output_ids for generation in list(generations) for request in generation.requests):
                go.wait(300)
            return step()

        engine.step = step_or_wait
        try:
            yield made, read_until_started(made.url, max_tokens=200, n=4), go
        finally:
            go.set()


def test_a_signal_lets_streams_end_and_refuses_new_requests():
    with answering(drain_seconds=3600) as (made, readers, go):
        made.server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(f"{made.url}/ready").json()["status"] == "draining"
        refused = httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x"))
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert httpx.get(f"{made.url}/health").status_code == 200
        go.set()
        for reader in readers:
            reader.join(120)
        assert all(
            r.text.endswith("data: [DONE]\n\n") and r.text.count('"finish_reason":"length"') == 4 for r in readers
        )
        wait_until(lambda: made.server.should_exit)


@pytest.mark.parametrize("signals, seconds", [(2, 3600), (1, 0.1)], ids=["twice", "time is up"])
def test_what_does_not_end_in_time_is_cut_off_with_an_error(signals, seconds):
    with answering(drain_seconds=seconds) as (made, readers, _):
        for _ in range(signals):
            made.server.handle_exit(signal.SIGINT, None)
        for reader in readers:
            reader.join(120)
        events = [json.loads(r.text.strip().split("\n\n")[-2].removeprefix("data: ")) for r in readers]
        assert [event["error"]["code"] for event in events] == ["shutting_down"] * READERS


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)], ids=str)
def test_a_process_ends_well_after_signals(numbers):
    """Every stream is ended properly, whether its answer is complete or not."""
    with program("--max-requests", 8, "--drain-timeout", 3600) as made:
        readers = read_until_started(made.url)
        for number in numbers:
            made.signal(number)
        for reader in readers:
            reader.join(120)
        assert all(r.text.endswith("data: [DONE]\n\n") for r in readers) and made.process.wait(60) == 0
