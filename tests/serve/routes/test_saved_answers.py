"""Answers of every route, whole and streamed, saved to files: `lockstep verify` reads them and compares all that they
show with what their receipts prove."""

import contextlib
import json

import httpx
import pytest

from lockstep import LLM
from lockstep.cli import main
from lockstep.commands.terminal import verification
from lockstep.receipts.envelope import from_object
from lockstep.receipts.statement import from_bytes as statement_of
from lockstep.serve.limits import Limits
from tests.serve.server import running

WHOLE = {
    "completion": ("/v1/completions", dict(prompt="import os\n", max_tokens=16)),
    "echo": ("/v1/completions", dict(prompt="import os\n", max_tokens=16, echo=True, logprobs=2)),
    "special": ("/v1/completions", dict(prompt="<|im_start|>user\n", max_tokens=4, echo=True)),
    "ids": ("/v1/completions", dict(prompt="x = ", max_tokens=9, return_token_ids=True, logprobs=1, temperature=1)),
    "score": ("/v1/completions", dict(prompt="import os", max_tokens=0, echo=True, logprobs=1)),
    "scores": ("/v1/completions", dict(prompt=["import os", "def f"], max_tokens=0, echo=True, logprobs=1)),
    "silent": ("/v1/completions", dict(prompt="import os", max_tokens=0, return_token_ids=True)),
    "prompt": ("/v1/completions", dict(prompt="import os", max_tokens=3, prompt_logprobs=1)),
    "samples": ("/v1/completions", dict(prompt=["a", "b"], n=2, max_tokens=5, temperature=1, logprobs=0)),
    "chat": ("/v1/chat/completions", dict(max_tokens=16, logprobs=True, top_logprobs=1, return_token_ids=True)),
    "messages": ("/v1/messages", dict(max_tokens=16)),
    "responses": ("/v1/responses", dict(input="Hi", max_output_tokens=16)),
    "scored": ("/v1/responses", dict(input="Hi", max_output_tokens=9, include=["message.output_text.logprobs"])),
    "stopped": ("/v1/messages", dict(max_tokens=64, stop_sequences=["e"])),
}
UNSTREAMED = ("prompt",)


def body_of(name, **more):
    path, body = WHOLE[name]
    asked = {} if "prompt" in body or "input" in body else dict(messages=[dict(role="user", content="Hi")])
    return path, asked | body | dict(receipt=True) | more


def ask(server, name, **more):
    path, body = body_of(name, **more)
    made = httpx.post(f"{server.url}{path}", json=body)
    assert made.status_code == 200, made.text
    return made.text


@pytest.fixture
def verify(tmp_path, capsys, llm, monkeypatch):
    """A function that verifies a text: (exit code, what is said). It loads no model: it has one."""
    monkeypatch.setattr(verification, "content_of", lambda _: llm.content.wait())
    monkeypatch.setattr(verification, "loaded", lambda *_, **__: contextlib.nullcontext(llm))

    def run(text, *options):
        (tmp_path / "file").write_text(text)
        capsys.readouterr()
        code = main(["verify", str(tmp_path / "file"), "--threads", "1", *options])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.mark.parametrize("name", WHOLE)
def test_whole_answers(server, verify, tmp_path, name):
    code, said = verify(ask(server, name))
    assert code == 0, said
    (tmp_path / "body").write_text(json.dumps(body_of(name)[1]))
    code, said = verify(ask(server, name), "--request", str(tmp_path / "body"))
    assert code == 0, said


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in UNSTREAMED])
def test_streams(server, verify, name):
    text = ask(server, name, stream=True)
    for saved in (text, text.replace("\n", "\r\n"), "\n".join(line for line in text.splitlines() if line)):
        code, said = verify(saved)
        assert code == 0, said
    last = [line[6:] for line in text.splitlines() if line.startswith("data: ") and '"payloadType"' in line]
    code, said = verify("\n".join(last))
    assert code == 0, said
    if name in ("completion", "echo", "ids"):
        code, said = verify(text.replace('"text":"', '"text":"!', 1))
        assert code == 1 and "another text" in said


def test_a_stream_that_is_damaged_or_incomplete(server, verify):
    text = ask(server, "responses", stream=True)
    assert "not that of its last event" in verify(text.replace('"delta":"', '"delta":"!', 1))[1]
    assert "expected the last event of the stream" in verify(text[: text.rindex("event: response.")])[1]
    text = ask(server, "completion", stream=True)
    assert "got an object with choices" in verify(text.replace('"receipt":', '"other":'))[1]
    for wrong, words in (
        ("data: 5\n", "events that are objects"),
        ("data: {\n", "expected JSON"),
        ('data: {"error":{"message":"busy"}}\n', "ended with an error"),
        ('data: {"choices":[{"text":"a"}]}\n', "whose choices have an index"),
        ('data: {"type":"ping"}\n', "expected the events of an answer with a receipt"),
    ):
        code, said = verify(wrong)
        assert code == 2 and words in said


CHANGES = {
    "finish_reason": ("completion", lambda c: c.update(finish_reason="stop"), "ended by stop, the receipt by length"),
    "logprob": ("ids", lambda c: c["logprobs"]["token_logprobs"].__setitem__(4, -0.5), "token 4 of the answer"),
    "fewer": ("ids", lambda c: c["logprobs"]["token_logprobs"].pop(), "shows 8 log-probabilities"),
    "echoed": ("echo", lambda c: c["logprobs"]["token_logprobs"].__setitem__(1, -0.5), "token 1 of the prompt"),
    "score": ("score", lambda c: c["logprobs"]["token_logprobs"].__setitem__(1, -0.5), "token 1 of the prompt"),
    "score's text": ("score", lambda c: c.update(text="import sys"), "another text"),
    "score's end": ("score", lambda c: c.update(finish_reason="stop"), "ended by stop"),
    "prompt": ("prompt", lambda c: c["prompt_logprobs"].__setitem__(1, {"5": {"logprob": -1}}), "of the prompt"),
    "no prompt": ("prompt", lambda c: c["prompt_logprobs"].pop(), "tokens of the prompt"),
    "chat": ("chat", lambda c: c["logprobs"]["content"][3].update(logprob=-0.5), "token 3 of the answer"),
    "calls": ("chat", lambda c: c.update(finish_reason="tool_calls"), "ended by stop, the receipt by length"),
    "ids": ("ids", lambda c: c["token_ids"].__setitem__(2, 7), "token 2 of the answer is not the receipt's"),
    "no ids": ("ids", lambda c: c.update(token_ids=[1.5]), "token_ids: expected token ids"),
    "prompt ids": ("ids", lambda c: c.update(prompt_token_ids=[5]), "the prompt is another one"),
    "text's type": ("ids", lambda c: c.update(text=5), "text: expected a text"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_around_a_receipt_is_seen(server, verify, change):
    name, edit, words = CHANGES[change]
    made = json.loads(ask(server, name))
    edit(made["choices"][0])
    code, said = verify(json.dumps(made))
    assert code in (1, 2) and words in said, said


def test_what_is_changed_in_messages_and_responses_is_seen(server, verify):
    made = json.loads(ask(server, "stopped"))
    for field, value in (("stop_sequence", "f"), ("stop_reason", "max_tokens")):
        code, said = verify(json.dumps(made | {field: value}))
        assert code == 1, said
    made = json.loads(ask(server, "responses"))
    assert verify(json.dumps(made | dict(status="completed")))[0] == 1
    made = json.loads(ask(server, "scored"))
    made["output"][0]["content"][0]["logprobs"][2]["logprob"] = -0.25
    code, said = verify(json.dumps(made))
    assert code == 1 and "no token there has the log-probability -0.25" in said


def test_what_was_not_compared_is_said(server, verify):
    assert "not compared" not in verify(ask(server, "completion"))[1]
    assert "the alternatives were not compared" in verify(ask(server, "echo"))[1]
    said = verify(ask(server, "chat"))[1]
    assert "the alternatives" in said and "the text around it" not in said
    made = json.loads(ask(server, "messages"))
    assert "not compared" not in verify(json.dumps(made))[1]
    made["content"][0]["text"] += "!"
    assert "the text around it was not compared with its tokens" in verify(json.dumps(made))[1]
    said = verify(ask(server, "score"))[1]
    assert "the log-probabilities of a prompt of 2 tokens, and 1 token after it" in said
    assert "shows nothing of this token, as max_tokens 0 asks" in said


def test_a_stream_that_goes_on(server, verify):
    whole = json.loads(ask(server, "ids", seed=5))["choices"][0]
    more = dict(seed=5, continue_from=whole["token_ids"][:4])
    code, said = verify(ask(server, "ids", stream=True, **more))
    assert code == 0 and "of its text only the last" in said
    assert verify(ask(server, "ids", **more))[0] == 0


def test_choices_are_not_exchanged(server, verify, tmp_path):
    made = json.loads(ask(server, "samples"))
    first = made["choices"][0]["receipt"]
    for number in (1, 2):
        changed = json.loads(json.dumps(made))
        kept = dict(changed["choices"][0], index=number)
        changed["choices"][number] = kept
        assert kept["receipt"] == first
        (tmp_path / "body").write_text(json.dumps(body_of("samples")[1]))
        code, said = verify(json.dumps(changed), "--request", str(tmp_path / "body"))
        assert code == 1 and f"choice {number}: false" in said
    code, said = verify(json.dumps(made))
    assert code == 0 and said.endswith("4 receipts: 4 true\n")


def test_detached_and_hidden(server, verify, tmp_path):
    options = dict(detached=True, hide_prompt=True)
    made = ask(server, "chat", receipt=options)
    (tmp_path / "body").write_text(json.dumps(body_of("chat", receipt=options)[1]))
    assert verify(made, "--request", str(tmp_path / "body"))[0] == 0
    made = ask(server, "ids", receipt=options)  # this route shows the prompt's ids beside the answer's
    assert verify(made)[0] == 0
    made = ask(server, "samples", return_token_ids=True, receipt=options)  # a salt for each
    assert verify(made)[0] == 0
    code, said = verify(made, "--salt", "00" * 32)
    assert code == 2 and "--salt: expected one for each of 4 receipts, got 1" in said
    code, said = verify(made, *["--salt", "00" * 32] * 4)
    assert code == 1 and "or the salt is" in said


def differs(verify, tmp_path, body, made):
    """What verifying an answer with a request's body finds: (exit code, what is said)."""
    (tmp_path / "body").write_text(json.dumps(body))
    return verify(made, "--request", str(tmp_path / "body"))


def test_a_request_that_goes_on_from_other_tokens(server, verify, tmp_path):
    path, body = body_of("completion", max_tokens=8)
    made = httpx.post(f"{server.url}{path}", json=body).text
    ids = statement_of(from_object(json.loads(made)["choices"][0]["receipt"]).payload).answer.ids
    code, said = differs(verify, tmp_path, body | dict(continue_from=[9, 9, 9]), made)
    assert code == 1 and "token 0 of the answer is" in said and "the request goes on from 9" in said
    assert differs(verify, tmp_path, body | dict(continue_from=list(ids[:3])), made)[0] == 0


def test_defaults_that_a_request_leaves_out(server, verify, tmp_path):
    path, body = body_of("completion")
    for defaults in ({}, server.service.loaded.sampling_defaults):  # of --generation-config none, and auto
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LLM, "sampling_defaults", defaults)
            made = httpx.post(f"{server.url}{path}", json=body).text
        code, said = differs(verify, tmp_path, body, made)
        assert code == 0, said
    code, said = differs(verify, tmp_path, body | dict(top_k=3), made)
    assert code == 1 and "the request has top_k 3, the receipt 0" in said


def test_numbers_that_are_a_usual_one_as_float32(server, verify, tmp_path):
    for change in (dict(top_p=0.99999999999), dict(repetition_penalty=1.00000000001), dict(min_p=1e-46)):
        path, body = body_of("completion", temperature=1, **change)
        made = httpx.post(f"{server.url}{path}", json=body).text
        code, said = differs(verify, tmp_path, body, made)
        assert code == 0, said


def test_a_server_that_allows_fewer_tokens(verify, tmp_path):
    with running(limits=Limits(max_answer_values=200)) as server:
        for more, code, words in (({}, 2, "the server allowed no more"), (dict(stop=["\n"]), 0, "true")):
            path, body = body_of("completion", prompt="import os", max_tokens=-1, logprobs=4, **more)
            made = httpx.post(f"{server.url}{path}", json=body).text
            found, said = differs(verify, tmp_path, body, made)
            assert found == code and words in said, said


def test_a_small_context(verify, tmp_path):
    with running(max_context=64) as server:
        cut = dict(prompt="import os\n" * 40, truncate_prompt_tokens=-1, max_tokens=20, stop=["\n", "e", "o"])
        exact = dict(prompt=[300 + i for i in range(44)], max_tokens=20, ignore_eos=True)
        full = dict(prompt="x = ", max_tokens=-1, ignore_eos=True)
        for asked, code, words in (
            (cut, 2, "the prompt was cut to a context of 64 tokens"),
            (exact, 0, "true"),
            (full, 2, "the answer ended at a context of 64 tokens"),
        ):
            path, body = body_of("completion", **asked)
            made = httpx.post(f"{server.url}{path}", json=body).text
            found, said = differs(verify, tmp_path, body, made)
            assert found == code and words in said, said


def test_texts_that_two_readers_read_differently(server, verify):
    text = ask(server, "ids")
    for field in ("text", "receipt", "payload"):
        value = '{"payloadType":1}' if field == "receipt" else '"!"'
        for changed in (text.replace(f'"{field}":', f'"{field}":{value},"{field}":', 1),):
            code, said = verify(changed)
            assert code == 2 and f"each key of a JSON object once, got '{field}' twice" in said
    assert verify(text.replace('"text":"', '"text":"\u2028', 1))[0] == 1  # it is text, and ends no line
    assert verify(f"{text}\n\n{text}\n")[0] == 0
