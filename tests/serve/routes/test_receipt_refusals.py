"""What the API refuses of receipts, rather than ignoring it: misspelt fields, receipts that nobody could verify."""

import os
import stat

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from lockstep import LLM
from lockstep.receipts.envelope import from_object
from lockstep.receipts.keys import SigningKey
from lockstep.serve.app import make_app
from lockstep.serve.receipts import desk
from lockstep.serve.receipts.desk import ReceiptDesk
from lockstep.serve.service import Service
from tests.serve.chatting import HELLO
from tests.serve.server import SIZES, listening

VERIFY = "/v1/receipts/verify"
REQUESTS = {
    "/v1/completions": dict(prompt="a", max_tokens=2),
    "/v1/chat/completions": dict(messages=HELLO, max_tokens=2),
    "/v1/messages": dict(messages=HELLO, max_tokens=2),
    "/v1/responses": dict(input="Hi", max_output_tokens=2),
}


def refusal(server, path, **body):
    made = httpx.post(f"{server.url}{path}", json=body)
    assert made.status_code == 400, made.text
    return made.json()["error"]["message"]


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("name", ["hidden", "hide-prompt", "hideprompt", "Nonce"])
def test_unknown_keys_of_a_receipt_are_refused(server, path, name):
    said = refusal(server, path, **REQUESTS[path], receipt={name: True})
    assert f"receipt.{name}: no such field, expected one of tags, detached, hide_prompt, nonce" in said


def test_unknown_fields_of_a_verification_are_refused(server):
    made = httpx.post(f"{server.url}/v1/completions", json=REQUESTS["/v1/completions"] | dict(receipt=True)).json()
    receipt = made["choices"][0]["receipt"]
    for name in ("tokens", "Request", "answer", "requests"):
        assert f"{name}: no such field, expected one of model, receipt" in refusal(
            server, VERIFY, receipt=receipt, **{name: [1, 2, 3]}
        )
    made = httpx.post(f"{server.url}{VERIFY}", json=dict(receipt=receipt, prompt_token_ids=[])).json()
    assert made["verdict"] != "true"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_detached_receipt_that_nobody_could_verify_is_refused(server, path):
    said = refusal(server, path, **REQUESTS[path], receipt=dict(detached=True))
    assert "receipt.detached: answers of this route have no token ids" in said


def test_a_detached_receipt_needs_the_ids_in_the_answer(server):
    for path in ("/v1/completions", "/v1/chat/completions"):
        said = refusal(server, path, **REQUESTS[path], receipt=dict(detached=True))
        assert "receipt.detached: expected return_token_ids to be true, too" in said
    body = dict(prompt="a", max_tokens=0, echo=True, return_token_ids=True, receipt=dict(detached=True))
    assert "expected false or none with max_tokens 0" in refusal(server, "/v1/completions", **body)


def test_an_embedding_has_no_receipt(server):
    assert "receipt: not supported" in refusal(server, "/v1/embeddings", input="a", receipt=True)
    made = httpx.post(f"{server.url}/v1/embeddings", json=dict(input="a", receipt=False))
    assert made.status_code == 200


@pytest.fixture
def keeping(tmp_path):
    """(URL of a server that keeps and signs receipts, its file, its key); the file ended within a line before."""
    key, kept = SigningKey(ed25519.Ed25519PrivateKey.generate()), tmp_path / "kept.jsonl"
    service = Service("keeping")
    service.receipts = ReceiptDesk(service, key, str(kept))
    service.open(LLM(**SIZES))
    with listening(service, make_app(service)) as (_, port):
        yield f"http://127.0.0.1:{port}", kept, key


def test_the_file_of_all_receipts_is_private_and_has_each_answer_that_was_seen(keeping, monkeypatch):
    url, kept, _ = keeping
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for number in range(1, 4):
        with httpx.stream("POST", f"{url}/v1/completions", json=dict(prompt="a", max_tokens=5, stream=True)) as made:
            for line in made.iter_lines():
                if '"finish_reason":"length"' in line:
                    break  # a client that leaves once it has the end of its answer
        assert len(kept.read_bytes().splitlines()) == number


def test_a_receipt_that_cannot_be_kept_is_an_error(keeping, monkeypatch):
    url, kept, _ = keeping
    before = kept.read_bytes()
    write = os.write
    monkeypatch.setattr(desk.os, "write", lambda handle, data: write(handle, data[:40]))
    made = httpx.post(f"{url}/v1/completions", json=dict(prompt="a", max_tokens=5))
    assert made.status_code == 500 and "receipt of this answer cannot be kept: No space left" in made.text
    assert kept.read_bytes() == before
    monkeypatch.undo()
    assert httpx.post(f"{url}/v1/completions", json=dict(prompt="a", max_tokens=5)).status_code == 200
    assert len(kept.read_bytes().splitlines()) == 1


def test_a_file_that_ends_within_a_line(tmp_path):
    kept = tmp_path / "torn.jsonl"
    kept.write_bytes(b'{"payload')
    service = Service("torn")
    service.receipts = ReceiptDesk(service, None, str(kept))
    service.receipts.keep(b"{}\n")
    service.close()
    assert kept.read_bytes() == b'{"payload\n{}\n'


def test_what_a_verification_says_of_signatures(keeping):
    url, _, key = keeping
    body = dict(prompt="a", max_tokens=3, receipt=True)
    signed = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["receipt"]
    other = SigningKey(ed25519.Ed25519PrivateKey.generate())
    broken = signed | dict(signatures=[signed["signatures"][0] | dict(sig="A" * 86 + "==")])
    foreign = from_object(broken | dict(signatures=[])).signed(other).to_object()
    for receipt, more, verdict, checks in (
        (signed, {}, "true", ["valid"]),
        (signed, dict(key=key.public.pem), "true", ["valid"]),
        (signed, dict(key=other.public.pem), "false", ["valid", "invalid"]),
        (broken, {}, "false", ["invalid"]),
        (foreign, {}, "true", ["not_checked"]),
        (foreign, dict(key=other.public.pem), "true", ["valid"]),
        (signed | dict(signatures=[]), {}, "true", []),
    ):
        made = httpx.post(f"{url}{VERIFY}", json=dict(receipt=receipt) | more).json()
        assert made["verdict"] == verdict and [each["check"] for each in made["signatures"]] == checks
        assert verdict == "true" or made["what"] == "signature"
    made = httpx.post(f"{url}{VERIFY}", json=dict(receipt=signed, key="/etc/passwd"))
    assert made.status_code == 400 and "key: expected a PEM file with a public Ed25519 key" in made.text
