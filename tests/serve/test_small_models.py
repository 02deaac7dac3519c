"""Models over HTTP whose tokenizers or heads differ from the bundled one's."""

import contextlib
import json
from dataclasses import replace

import httpx
import numpy as np
import pytest

from lockstep import LLM
from lockstep.serve.service import system_fingerprint
from tests.llm.test_pooling import embedding_folder, pooled
from tests.serve.server import running
from tests.text.tokenizer.test_small_gguf import chatml, write
from tests.text.vocabularies import words_metadata

SIZES = dict(threads=1, max_requests=4, max_context=128)


@contextlib.contextmanager
def serving(path):
    with running(LLM(str(path), **SIZES)) as server:
        yield server


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A SentencePiece model."""
    with serving(write(tmp_path_factory.mktemp("words") / "m.gguf", words_metadata())) as server:
        yield server


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def complete(server, **body):
    answer = post(server, "/v1/completions", **dict(temperature=0) | body)
    return answer.json()["choices"][0] if answer.status_code == 200 else answer.json()["error"]


def cat(server):
    """A bias that makes every token "▁cat"."""
    return {str(server.service.tokenizer.backend.token_to_id("▁cat")): 100}


def test_a_sentencepiece_answer_goes_on_with_its_prompt(words):
    asked = dict(prompt="the", max_tokens=2, logit_bias=cat(words))
    assert complete(words, **asked)["text"] == " cat cat"
    assert complete(words, **asked, echo=True)["text"] == "the cat cat"
    assert (
        complete(words, **asked | dict(prompt=[1, words.service.tokenizer.backend.token_to_id("▁the")]), echo=True)[
            "text"
        ]
        == "the cat cat"
    )
    assert complete(words, **asked, stop=" cat")["text"] == ""
    assert complete(words, **asked | dict(prompt=""))["text"] == "cat cat"
    body = asked | dict(stream=True, temperature=0)
    with httpx.stream("POST", f"{words.url}/v1/completions", json=body, timeout=60) as answer:
        sent = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in sent) == " cat cat"


def test_logprobs_of_a_sentencepiece_answer_are_of_its_text(words):
    asked = dict(prompt="the", max_tokens=2, logit_bias=cat(words), logprobs=1)
    found = complete(words, **asked)
    assert "".join(found["logprobs"]["tokens"]) == found["text"] and found["logprobs"]["text_offset"] == [0, 4]
    echoed = complete(words, **asked, echo=True)
    assert echoed["logprobs"]["tokens"] == ["<s>", "", "t", "h", "e", " cat", " cat"]
    assert echoed["logprobs"]["text_offset"] == [0, 0, 0, 1, 2, 3, 7]


def test_a_guided_answer_matches_as_a_whole(words):
    for prompt in ("the", ""):
        assert complete(words, prompt=prompt, max_tokens=9, guided_regex=" the(x|c)")["text"] in (" thex", " thec")


def test_a_prompt_with_bos_has_one(words):
    asked = [post(words, "/tokenize", prompt=prompt).json()["tokens"] for prompt in ("the", "<s>the")]
    assert asked[0] == asked[1] and asked[0].count(1) == 1


def test_the_fingerprint_names_special_tokens_and_pooling(words, monkeypatch):
    llm = words.service.llm
    found = [system_fingerprint(llm)]
    for name, value in (("tokenizer", replace(llm.tokenizer, special_tokens={})), ("pooling", "mean")):
        with monkeypatch.context() as patch:
            patch.setitem(vars(llm), name, value)
            found.append(system_fingerprint(llm))
    assert len(set(found)) == 3 and system_fingerprint(llm) == found[0]


def test_an_unknown_pre_tokenizer_takes_token_ids(tmp_path):
    with serving(write(tmp_path / "m.gguf", chatml(pre="kimi-k2"))) as server:
        assert complete(server, prompt=[5, 6], max_tokens=2)["text"]
        assert "'kimi-k2' is not supported" in complete(server, prompt="text")["message"]
        chat = post(server, "/v1/chat/completions", messages=[dict(role="user", content="x")])
        assert chat.status_code == 400


def test_a_checkpoint_without_a_head_only_embeds(tmp_path):
    folder = embedding_folder(tmp_path)
    with pytest.raises(ValueError, match="cls"):
        pooled(folder, pooling_mode="cls")
    with serving(folder) as server:
        refused = complete(server, prompt=[5, 6])
        assert "no lm_head: it makes embeddings" in refused["message"] and refused["type"] == "invalid_request_error"
        asked = [post(server, "/v1/embeddings", input=[5, 6], **body) for body in ({}, dict(pooling="mean"))]
    assert [answer.status_code for answer in asked] == [400, 200]
    assert "pooling by cls is not supported" in asked[0].json()["error"]["message"]
    pooled(folder, pooling_mode="mean")
    with serving(folder) as server:
        default = post(server, "/v1/embeddings", input=[5, 6]).json()
    assert np.array_equal(default["data"][0]["embedding"], asked[1].json()["data"][0]["embedding"])
