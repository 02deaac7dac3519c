"""Receipts over HTTP: every route gives one where it is asked to, and /v1/receipts/verify says which are true."""

import copy
import json

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from lockstep import LLM
from lockstep.receipts.batch import batch_of
from lockstep.receipts.envelope import from_bytes, from_object
from lockstep.receipts.fields import to_base64
from lockstep.receipts.keys import SigningKey
from lockstep.receipts.parameters import seed_of
from lockstep.receipts.statement import from_bytes as statement_of
from lockstep.serve import generation
from lockstep.serve.app import make_app
from lockstep.serve.receipts.desk import ReceiptDesk
from lockstep.serve.service import Service
from tests.serve.chatting import HELLO
from tests.serve.server import SIZES, listening

VERIFY = "/v1/receipts/verify"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
]
REQUESTS = {
    "/v1/completions": dict(prompt="import os\n", max_tokens=20, temperature=0.8, seed=4),
    "/v1/chat/completions": dict(messages=[dict(role="user", content="Hi")], max_tokens=20),
    "/v1/messages": dict(messages=[dict(role="user", content="Hi")], max_tokens=20),
    "/v1/responses": dict(input="Hi", max_output_tokens=20),
}
FORMS = [
    dict(response_format=dict(type="json_object"), max_tokens=30),
    dict(tools=TOOLS, tool_choice="required", temperature=0.9, max_tokens=30),
    dict(tools=TOOLS, max_tokens=30),
    dict(bad_words=["self"], allowed_token_ids=list(range(300, 2000)), ignore_eos=True, max_tokens=12),
    dict(structured_outputs=dict(regex="[a-z]+ x"), ignore_eos=True, temperature=1, max_tokens=20, n=2),
    dict(presence_penalty=0.5, logit_bias={"300": 5}, min_tokens=5, stop=["\n"], temperature=1, max_tokens=20),
]


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body)


def verified(server, receipt, **body):
    made = post(server, VERIFY, receipt=receipt, **body)
    assert made.status_code == 200, made.text
    return made.json()


def choices_of(made):
    return made["choices"] if "choices" in made else [made]


def last_receipt(text):
    """The receipt in a stream, and in how many of its events there is one."""
    events = [json.loads(line[6:]) for line in text.splitlines() if "payloadType" in line]
    last = events[-1].get("response", events[-1])
    return choices_of(last)[0]["receipt"], len(events)


@pytest.mark.parametrize("path", REQUESTS)
def test_every_route_gives_receipts_whole_and_streamed(server, path):
    body = REQUESTS[path] | dict(receipt=True)
    made = choices_of(post(server, path, **body).json())[0]["receipt"]
    assert verified(server, made)["verdict"] == verified(server, made, request=body)["verdict"] == "true"
    streamed, count = last_receipt(post(server, path, stream=True, **body).text)
    assert (streamed, count) == (made, 1)
    statement = statement_of(from_object(made).payload)
    assert statement.endpoint == path and statement.model.name == "lockstep"
    assert "receipt" not in post(server, path, **REQUESTS[path]).text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_forms_and_samples(server, form):
    body = dict(messages=HELLO, seed=3, receipt=dict(tags=True)) | form
    made = post(server, "/v1/chat/completions", **body).json()
    assert len(made["choices"]) == form.get("n", 1)
    for choice in made["choices"]:
        assert verified(server, choice["receipt"])["verdict"] == "true"
        assert verified(server, choice["receipt"], request=body)["verdict"] == "true"


def test_what_is_left_out_or_hidden_is_needed(server):
    body = dict(messages=HELLO, max_tokens=15, return_token_ids=True, temperature=1)
    body |= dict(receipt=dict(detached=True, hide_prompt=True, nonce="one"), response_format=dict(type="json_object"))
    made = post(server, "/v1/chat/completions", **body).json()
    [choice], prompt = made["choices"], made["prompt_token_ids"]
    receipt, salt = choice["receipt"], choice["receipt_salt"]
    assert verified(server, receipt)["verdict"] == "not_checked"
    known = dict(salt=salt, token_ids=choice["token_ids"])
    assert verified(server, receipt, request=body, **known)["verdict"] == "true"
    found = verified(server, receipt, prompt_token_ids=prompt, **known)
    assert (found["verdict"], found["what"]) == ("not_checked", "form")
    found = verified(server, receipt, request=body, **known | dict(token_ids=choice["token_ids"][:-1]))
    assert (found["verdict"], found["what"]) == ("false", "tokens")
    assert verified(server, receipt, request=body, salt="00" * 32)["what"] == "prompt"


def test_a_receipt_is_of_its_request_only(server):
    body = dict(prompt=["import os\n", "x = "], max_tokens=10, temperature=0.7, top_p=0.9, receipt=dict(nonce="a"))
    made = post(server, "/v1/completions", **body).json()["choices"]
    prompts = ["import os\n", "x = "]
    for number, choice in enumerate(made):
        statement = statement_of(from_object(choice["receipt"]).payload)
        # nobody chose this seed: it follows from the nonce and the prompt
        assert statement.params.seed == seed_of("a", server.service.tokenizer.encode(prompts[number]))
        assert verified(server, choice["receipt"], request=body)["verdict"] == "true"
        changes = {
            "sampling.temperature": dict(temperature=0.71),
            "sampling.top_p": dict(top_p=1),
            "sampling.max_tokens": dict(max_tokens=11),
            "sampling.seed": dict(receipt=dict(nonce="a"), seed=1),
            "nonce": dict(receipt=True),
            "prompt": dict(prompt="import sys\n"),
            "form": dict(allowed_token_ids=[5]),
        }
        for what, change in changes.items():
            found = verified(server, choice["receipt"], request=body | change)
            assert (found["verdict"], found["what"]) == ("false", what)
    refused = post(server, VERIFY, receipt=made[0]["receipt"], request=body | dict(max_tokens="x"))
    assert refused.status_code == 400 and "request: max_tokens" in refused.text


def test_false_receipts(server):
    made = post(server, "/v1/completions", receipt=True, **REQUESTS["/v1/completions"]).json()["choices"][0]["receipt"]
    payload = json.loads(from_object(made).payload)
    for place, value, expected in (
        (("answer", "root"), "0" * 64, ("false", "root")),
        (("sampling", "seed"), "5", ("false", "token")),
        (("model", "content"), "0" * 64, ("not_checked", "model.content")),
        (("endpoint",), "/v1/other", ("true", None)),
    ):
        changed = copy.deepcopy(payload)
        part = changed
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = value
        receipt = made | dict(payload=to_base64(json.dumps(changed).encode()))
        found = verified(server, receipt)
        assert (found["verdict"], found.get("what")) == expected
    assert post(server, VERIFY, receipt=receipt, request=REQUESTS["/v1/completions"]).status_code == 400


@pytest.mark.parametrize("body, said", [
    ({}, "receipt"),
    (dict(receipt={}), "envelope.payloadType: expected, but missing"),
    (dict(receipt=dict(payloadType="x", payload="", signatures=[])), "envelope.payloadType: expected application/vnd"),
    (dict(receipt=dict(payloadType="application/vnd.lockstep.receipt+json", payload="e30=", signatures=[])), "version"),
    (dict(receipt=5), "receipt"),
])  # fmt: skip
def test_what_is_no_receipt(server, body, said):
    made = post(server, VERIFY, **body)
    assert made.status_code == 400 and said in made.json()["error"]["message"]


def test_what_no_receipt_is_made_of(server):
    for receipt, said in (
        ("yes", "receipt: expected true, false or an object with any of tags, detached, hide_prompt, nonce"),
        (dict(nonce="\n"), "nonce"),
        (dict(tags=1), "tags"),
    ):
        made = post(server, "/v1/completions", prompt="a", receipt=receipt)
        assert made.status_code == 400 and said in made.json()["error"]["message"]
    made = post(server, VERIFY, receipt={}, salt="x")
    assert made.status_code == 400


def test_a_server_signs_and_keeps_the_receipt_of_every_answer(tmp_path):
    key = SigningKey(ed25519.Ed25519PrivateKey.generate())
    service, kept = Service("signing"), tmp_path / "receipts.jsonl"
    service.receipts = ReceiptDesk(service, key, str(kept))
    service.open(LLM(**SIZES))
    with listening(service, make_app(service)) as (_, port):
        url = f"http://127.0.0.1:{port}"
        for path, body in REQUESTS.items():
            assert "receipt" not in httpx.post(f"{url}{path}", json=body, timeout=60).text
        assert httpx.post(f"{url}/v1/completions", json=dict(prompt="x", n=2, seed=1), timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/completions", json=dict(prompt=""), timeout=60).status_code == 400
        lines = kept.read_bytes().splitlines()
        receipts = [from_bytes(line) for line in lines]
        assert len(receipts) == 6 and all(each.is_signed_by(key.public) for each in receipts)
        for line in lines:
            found = httpx.post(f"{url}{VERIFY}", json=dict(receipt=json.loads(line)), timeout=60).json()
            assert found["verdict"] == "true"
        # scores of a prompt, as evaluations ask for them
        body = dict(prompt="import os", max_tokens=0, echo=True, logprobs=1)
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        last = kept.read_bytes().splitlines()[-1]
        assert statement_of(from_bytes(last).payload).prompt.root is not None
        found = httpx.post(f"{url}{VERIFY}", json=dict(receipt=json.loads(last), request=body), timeout=60).json()
        assert found["verdict"] == "true"
    assert batch_of(receipts).num_answers == 6


def test_long_answers_and_a_model_whose_files_are_still_read(server, monkeypatch):
    monkeypatch.setattr(generation, "LONG_TOKENS", 10)
    for stream in (False, True):
        made = post(server, "/v1/completions", prompt="x = ", max_tokens=30, n=2, receipt=True, stream=stream, seed=1)
        receipt = last_receipt(made.text)[0] if stream else made.json()["choices"][1]["receipt"]
        assert verified(server, receipt)["verdict"] == "true"
    monkeypatch.setattr(type(server.service.loaded), "content", property(lambda llm: Unknown()))
    for path, body in (("/v1/completions", dict(prompt="x", receipt=True)), (VERIFY, dict(receipt=receipt))):
        made = post(server, path, **body)
        assert made.status_code == 503 and made.headers["retry-after"] == "1" and "still being read" in made.text
    assert post(server, "/v1/completions", prompt="x", max_tokens=1).status_code == 200


class Unknown:
    """A content hash that is not known yet."""

    known = None
