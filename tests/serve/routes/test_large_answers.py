"""Answers are admitted by their number of values, and large ones are written in pieces between other answers."""

import json
import threading
import time

import httpx
import pytest

from lockstep.engine.request import SamplingParams
from lockstep.serve.answer_size import fit_answers, num_logprobs, num_values
from lockstep.serve.answers.json_response import PART, Parts, in_parts, json_pieces, to_json
from lockstep.serve.answers.logprobs import LegacyLogprobs
from lockstep.serve.answers.sse import LARGE
from lockstep.serve.errors import ApiError
from lockstep.serve.limits import Limits
from tests.serve.program import program
from tests.serve.server import running, wait_until
from tests.slowness import is_within

ASKED = dict(prompt=["def f(", "x"], n=8, max_tokens=100, logprobs=20, ignore_eos=True, temperature=1.0, seed=1)


# ---------------------------------------------------------------- admission


def test_values_are_tokens_and_log_probabilities():
    prompts = [([1] * 10, SamplingParams(max_tokens=5, n=3, logprobs=2)), ([1] * 4, SamplingParams(max_tokens=7))]
    assert (num_values(prompts), num_logprobs(prompts)) == (3 * 5 * 3 + 7, 3 * 5 * 2)
    echoed = [([1] * 10, SamplingParams(max_tokens=1, n=2, logprobs=3, prompt_logprobs=3))]
    assert num_values(echoed) == 2 * (1 * 4 + 10 * 4)


def test_answers_that_may_fill_the_context_are_made_shorter_and_others_refused():
    def prompt(max_tokens, **more):
        return [([1] * 10, SamplingParams(max_tokens=max_tokens, n=4, logprobs=4, **more))]

    assert (
        fit_answers(prompt(50), 1000, 1000) is not None and fit_answers(prompt(50), 1000, 1000)[0][1].max_tokens == 50
    )
    with pytest.raises(ApiError, match=r"1020 tokens and log-probabilities .* expected at most 1000"):
        fit_answers(prompt(51), 1000, 1000)
    assert fit_answers(prompt(990), 1000, 1000)[0][1].max_tokens == 50
    with pytest.raises(ApiError, match="expected at most 850"):  # 840 are the prompt's, and no sample has room for 5
        fit_answers(prompt(990, prompt_logprobs=20), 850, 1000)
    two = fit_answers([*prompt(990), ([1] * 990, SamplingParams(max_tokens=10))], 1000, 1000)
    assert [params.max_tokens for _, params in two] == [25, 10] and num_values(two) <= 1000


def test_the_review_s_request_is_refused_and_log_probabilities_in_work_are_bounded_together():
    hold = threading.Event()
    with running(limits=Limits(max_pending_logprobs=1000)) as made:
        step = made.service.engine.engine.step
        made.service.engine.engine.step = lambda: hold.wait(60) and step()
        url = f"{made.url}/v1/completions"
        got = httpx.post(url, json=dict(prompt=["a"] * 4, n=64, max_tokens=900, logprobs=20))
        assert got.status_code == 400 and got.json()["error"]["code"] == "answer_too_large"
        answers, alone = [], dict(prompt="x", n=2, max_tokens=40, logprobs=20)  # a request that is alone may have more
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=alone, timeout=60)))
        thread.start()
        wait_until(lambda: made.service.num_logprobs == 1600)
        more = httpx.post(url, json=dict(prompt="x", max_tokens=1, logprobs=1))
        assert more.status_code == 429 and more.json()["error"]["code"] == "answers_full"
        hold.set()
        assert httpx.post(url, json=dict(prompt="x", max_tokens=1), timeout=60).status_code == 200
        thread.join(60)
        assert answers[0].status_code == 200
        wait_until(lambda: made.service.num_logprobs == 0)  # the client may have read all before the server is through


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("count", [0, 1, PART - 1, PART, 3 * PART + 1])
def test_pieces_are_the_json_of_the_whole(count):
    def value():
        return dict(
            a=[1, "x\N{SNOWMAN}"],
            b=in_parts(count, lambda start, end: list(range(start, end))),
            c=[dict(d=Parts(iter([[], [{"e": None}], []])))],
            f=Parts([]),
        )

    whole = dict(a=[1, "x\N{SNOWMAN}"], b=list(range(count)), c=[dict(d=[{"e": None}])], f=[])
    pieces = list(json_pieces(value()))
    assert b"".join(pieces) == to_json(whole) == to_json(value()) and len(pieces) >= count // PART


@pytest.mark.parametrize("echo", [False, True])
def test_parts_of_log_probabilities_are_those_of_the_whole(llm, echo):
    made = llm.start("\N{SNOWMAN} def f(x):\n" * 10, SamplingParams(max_tokens=100, logprobs=3, prompt_logprobs=3))
    while made.request.finish_reason is None:
        llm.engine.step()
    request, count = made.request, len(made.request.output_ids)
    expected = LegacyLogprobs(llm.tokenizer, request, echo).part(0, count)
    assert len(expected["tokens"]) > 2 * echo * PART
    assert json.loads(to_json(LegacyLogprobs(llm.tokenizer, request, echo).whole(count))) == expected


@pytest.mark.parametrize(
    "path, asked, size",
    [
        ("/v1/completions", ASKED, lambda made: sum(len(c["logprobs"]["tokens"]) for c in made["choices"])),
        (
            "/v1/chat/completions",
            dict(
                messages=[dict(role="user", content="x")],
                n=16,
                max_tokens=60,
                logprobs=True,
                top_logprobs=20,
                ignore_eos=True,
                seed=1,
            ),
            lambda made: sum(len(c["logprobs"]["content"]) for c in made["choices"]),
        ),
    ],
)
def test_a_large_answer_is_the_same_as_a_small_one_in_pieces(server, monkeypatch, path, asked, size):
    large = httpx.post(server.url + path, json=asked, timeout=120)
    assert large.headers["transfer-encoding"] == "chunked" and 20 * size(large.json()) > LARGE
    monkeypatch.setattr("lockstep.serve.answers.sse.LARGE", 1 << 40)
    small = httpx.post(server.url + path, json=asked, timeout=120)
    assert "content-length" in small.headers and small.json()["choices"] == large.json()["choices"]


def test_others_are_answered_and_memory_is_bounded_while_a_large_answer_is_made_and_written():
    with program("--max-requests", 32) as made:
        httpx.post(f"{made.url}/v1/completions", json=ASKED, timeout=120)
        before, peak, done = made.rss_mb, 0.0, threading.Event()
        answers, waits = [], []

        def ask():
            asked = ASKED | dict(n=32, max_tokens=200)
            answers.append(httpx.post(f"{made.url}/v1/completions", timeout=120, json=asked))
            done.set()

        threading.Thread(target=ask).start()
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                began = time.monotonic(), made.processor_seconds
                assert client.get(f"{made.url}/health").status_code == 200
                waits.append(min(time.monotonic() - began[0], made.processor_seconds - began[1]))
                peak = max(peak, made.rss_mb)
                time.sleep(0.01)
        assert answers[0].status_code == 200 and len(answers[0].content) > 6e6
        assert is_within(max(waits), 0.5) and peak - before < 100, (max(waits), peak - before)
