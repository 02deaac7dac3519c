"""A model whose logits are not finite: every way to ask it reports that, and the server's health check fails."""

import json
import math

import httpx
import pytest

from lockstep import LLM, SamplingParams
from lockstep.cli import main
from lockstep.commands.terminal.conversation import Conversation
from lockstep.serve.service import Service
from tests.models.broken import overflowing
from tests.serve.server import SIZES, running

SAID = "the model's logits are not finite"
TALK = [dict(role="user", content="x")]
ASKED = {
    "/v1/completions": [
        dict(prompt="x", max_tokens=4),
        dict(prompt="x", max_tokens=4, logprobs=5, echo=True),
        dict(prompt=["x", "y"], max_tokens=4, n=2, temperature=0),
    ],
    "/v1/chat/completions": [dict(messages=TALK, logprobs=True, top_logprobs=20)],
    "/v1/messages": [dict(messages=TALK, max_tokens=5)],
    "/v1/responses": [dict(input="x")],
    "/v1/embeddings": [dict(input="x"), dict(input=["x", "y"], pooling="mean")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return overflowing(tmp_path_factory.mktemp("model"))


def test_every_route_answers_500_by_name_and_health_turns_red(folder):
    with running(LLM(folder, **SIZES)) as made:
        first = httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x"))
        assert first.status_code == 500 and first.json()["error"]["code"] == "not_finite"
        assert httpx.get(f"{made.url}/health").status_code == 200
        for path, bodies in ASKED.items():
            for body in bodies:
                got = httpx.post(made.url + path, json=body)
                said = got.json()["error"]["message"]
                assert (got.status_code, said) == (500, said) and said.endswith("are not finite"), (path, body, said)
        streamed = httpx.post(f"{made.url}/v1/completions", json=dict(prompt="x", stream=True)).text.split("\n\n")
        assert json.loads(streamed[-3].removeprefix("data: "))["error"]["message"] == SAID
        health = httpx.get(f"{made.url}/health")
        assert health.status_code == 503 and "in a row failed" in health.json()["reason"]
        assert httpx.get(f"{made.url}/ready").status_code == 503
        assert "lockstep_not_finite_total 14.0" in httpx.get(f"{made.url}/metrics").text
        assert not made.service.llm.engine.has_work


def test_three_in_a_row_are_red_and_one_that_goes_well_ends_it():
    service = Service("x")
    for faults in ([True, True, False, True, True], [True]):
        assert service.trouble is None
        for fault in faults:
            service.note_end(fault)
    assert "3 requests in a row" in service.trouble and service.engine_trouble is None
    service.note_end(False)
    assert service.trouble is None


def test_answers_from_python_have_the_reason(folder):
    llm = LLM(folder, threads=1, max_context=256)
    try:
        found = llm.generate("x", SamplingParams(max_tokens=4, n=2, temperature=1.0))[0]
        assert [(each.finish_reason, each.error, each.text) for each in found.samples] == [("error", SAID, "")] * 2
        stream = llm.stream("x")
        assert [chunk.finish_reason for chunk in stream] == ["error"] and stream.completion.error == SAID
        with pytest.raises(ValueError, match="hidden states are not finite"):
            llm.embed(["x"])
        prompt = llm.generate("def f", SamplingParams(max_tokens=1, prompt_logprobs=1))[0]
        assert prompt.error == SAID and all(map(math.isnan, prompt.prompt_logprobs))
    finally:
        llm.close()


def test_the_commands_say_it_and_end_with_an_error(folder, capsys):
    assert main(["generate", str(folder), "-p", "x", "--json", "--threads", "1"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) | dict(finish_reason="error", error=SAID) == json.loads(shown.out)
    assert shown.err.endswith(f"lockstep: {SAID}\n")
    assert main(["generate", str(folder), "-p", "x", "--threads", "1"]) == 2 and capsys.readouterr().out == "\n"
    llm = LLM(folder, threads=1, max_context=256)
    talk = Conversation(llm, dict(temperature=0.0, max_tokens=8))
    talk.hear("hello")
    llm.close()
    assert capsys.readouterr().err.endswith(f"({SAID})\n") and not talk.messages
