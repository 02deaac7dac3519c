"""The log: a line for each request, or a summary every 10 seconds, and no text of anybody's."""

import logging
import os
import threading
from types import SimpleNamespace

import httpx
import pytest

from lockstep.serve import request_log
from lockstep.serve.errors import ApiError
from lockstep.serve.log import LogWriter, log_level
from lockstep.serve.request_log import RequestLine, RequestLog, Work
from tests.serve.chatting import HELLO
from tests.serve.raw import exchange, head
from tests.serve.server import running, wait_until

SECRET = "confidential"
COMPLETIONS = "/v1/completions"


@pytest.fixture
def lines(caplog):
    """A function that returns the next line of the log as {name: value}; its first words are method, path, status."""
    caplog.set_level(logging.DEBUG, "lockstep.requests")
    seen = iter(range(1000))

    def next_line():
        index = next(seen)
        wait_until(lambda: len(caplog.records) > index)  # a line is written after the answer was sent
        made = caplog.records[index].getMessage()
        assert SECRET not in made
        words = dict(zip(("method", "path", "status"), made.split(), strict=False))
        return words | dict(level=caplog.records[index].levelname) | dict(w.split("=") for w in made.split()[3:])

    return next_line


def test_a_line_tells_what_a_request_took(server, lines):
    prompt = [7] * 130
    answer = httpx.post(server.url + COMPLETIONS, json=dict(prompt=prompt, max_tokens=9, ignore_eos=True, n=2))
    line, usage = lines(), answer.json()["usage"]
    assert (line["method"], line["path"], line["status"], line["level"]) == ("POST", COMPLETIONS, "200", "INFO")
    assert (line["prompt"], line["generated"], line["client"]) == ("130", "18", "127.0.0.1")
    assert line["cached"] == str(usage["prompt_tokens_details"]["cached_tokens"])
    assert {"queue", "ttft", "total", "prefill"} <= line.keys() and "error" not in line
    assert answer.headers["x-request-id"] == line["id"] and answer.json()["id"] == f"cmpl-{line['id']}"
    httpx.post(server.url + COMPLETIONS, json=dict(prompt=[prompt, [8]], max_tokens=1, cache_salt="other"))
    line = lines()
    assert (line["prompt"], line["cached"], line["generated"]) == ("131", "0", "2")
    assert "prefill" not in line and "decode" not in line, "the time is that of several prompts, and of one token each"


@pytest.mark.parametrize(
    "path, body",
    [
        (COMPLETIONS, dict(prompt=SECRET, max_tokens=3, stream=True)),
        ("/v1/chat/completions", dict(messages=HELLO, max_tokens=3)),
        ("/v1/messages", dict(messages=HELLO, max_tokens=3, stream=True)),
        ("/v1/responses", dict(input=SECRET, max_output_tokens=3)),
        ("/v1/embeddings", dict(input=[SECRET, "x"])),
        ("/tokenize", dict(prompt=SECRET)),
    ],
)
def test_every_route_has_one(server, lines, path, body):
    sent_id = "trace:1.x-Y_2"
    answer = httpx.post(server.url + path, json=body, headers={"X-Request-Id": sent_id})
    line = lines()
    assert (line["path"], line["status"], line["id"]) == (path, "200", sent_id) == (path, "200", line["id"])
    assert answer.headers["x-request-id"] == sent_id and ("prompt" in line) == (path != "/tokenize")
    assert ("ttft" in line) == (path not in ("/v1/embeddings", "/tokenize"))


def test_refused_requests_have_one_with_the_error_s_code(server, lines):
    def refused(path, **sent):
        httpx.post(server.url + path, headers={"X-Request-Id": "a b"}, **sent)
        line = lines()
        assert len(line["id"]) == 24, "this id of the client is not repeated"
        return line["path"], line["status"], line.get("error"), "prompt" in line

    assert refused(COMPLETIONS, json=dict(prompt=SECRET, n=SECRET)) == (COMPLETIONS, "400", "invalid_value", False)
    assert refused(f"//nowhere/a%0Ab?{SECRET}") == ("//nowhere/a%0Ab", "404", None, False)
    assert exchange(server, head("/x", "GET", Expect="wonders", Connection="close"))[0] == 417
    assert lines() == dict(
        method="GET", path="/x", status="417", level="INFO", error="unknown_expectation", client="127.0.0.1"
    )
    assert exchange(server, b"what is this\r\n\r\n")[0] == 400
    assert (lines()["level"], httpx.get(f"{server.url}/health").status_code) == ("DEBUG", 200)
    assert lines()["level"] == "DEBUG"


def test_a_client_that_leaves_and_an_answer_that_fails_have_one(server, lines):
    long = dict(prompt="x", max_tokens=900, ignore_eos=True, stream=True)
    with httpx.stream("POST", server.url + COMPLETIONS, json=long) as answer:
        next(answer.iter_bytes())
    line = lines()
    assert (line["status"], line["error"]) == ("200", "client_left") and 0 < int(line["generated"]) < 900
    with running() as made:
        made.service.tokenizer = None.__class__  # any object that is no tokenizer
        httpx.post(made.url + COMPLETIONS, json=dict(prompt="x"))
    assert lines()["level"] == "ERROR", "the traceback, which is not a line of a request"
    line = lines()
    assert (line["status"], line["error"], line["level"]) == ("500", "internal_error", "WARNING")


def test_a_summary_counts_what_was_computed_since_the_last_one(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "lockstep.requests")
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(request_log, "time", clock)
    metrics = SimpleNamespace(prompt_tokens=50, cached_tokens=10, generated_tokens=5)
    log = RequestLog(metrics, lambda: dict(running=2, waiting=1), is_quiet=True)
    for status, error in ((200, None), (404, None), (200, ApiError(400, "", code="generation_failed"))):
        log.ended(COMPLETIONS, status, error, lambda: RequestLine("POST", COMPLETIONS, 200, None, ""))
    log.ended("/ready", 200, None, lambda: RequestLine("GET", "/ready", 200, None, ""))
    metrics.prompt_tokens, metrics.cached_tokens, metrics.generated_tokens = 1050, 410, 105
    log.tick(1)
    clock.now = 110.0
    log.tick(0)
    clock.now = 120.0
    log.tick(0)  # there was no work
    clock.now = 130.0
    log.tick(1)
    figures = "prefill=60.0tok/s decode=10.0tok/s running=2 waiting=1"
    assert caplog.messages == [
        f"10 s: requests=3 failed=2 prompt=1000 cached=400 generated=100 {figures}",
        "10 s: requests=0 failed=0 prompt=0 cached=0 generated=0 running=2 waiting=1",
    ]


def test_only_computed_tokens_have_a_speed():
    work = Work(1000, 900, 11, 0.25, 1.5, prefill=(100, 0.5), decode=(10, 0.2))
    line = RequestLine("POST", "/p", 200, None, "::1", "x", 2.0, work)
    assert str(line) == (
        "POST /p 200 prompt=1000 cached=900 generated=11 queue=250ms ttft=1500ms total=2000ms "
        "prefill=200tok/s decode=50.0tok/s id=x client=::1"
    )


def test_a_level_by_its_name():
    assert (log_level("debug"), log_level("INFO")) == (logging.DEBUG, logging.INFO)
    with pytest.raises(ValueError, match="--log-level: expected debug, info, warning or error, got 'loud'"):
        log_level("loud")


def test_a_reader_that_does_not_read_holds_up_nobody(monkeypatch):
    monkeypatch.setattr("lockstep.serve.log.MAX_WAITING", 100)
    reading, writing = os.pipe()
    with os.fdopen(reading) as reader, os.fdopen(writing, "w") as stream:
        log, writer = logging.Logger("a log"), LogWriter(stream)
        log.addHandler(writer)
        log.error("%d", "first")
        for _ in range(300):
            log.warning("x" * 1000)  # a hundred of them are more than a pipe holds
        said = []
        thread = threading.Thread(target=lambda: said.extend(reader), daemon=True)
        thread.start()
        wait_until(lambda: any("were dropped: nobody read them in time" in line for line in said))
        assert said[0].startswith("a log: '%d', which cannot be formatted: TypeError") and said[1] == "x" * 1000 + "\n"
        log.warning("last")
        wait_until(lambda: said[-1] == "last\n")
        stream.close()
        thread.join(60)
        log.warning("nobody can read this")
        writer.flush()
