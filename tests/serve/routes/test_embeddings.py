"""/v1/embeddings, with the real openai client and raw requests."""

import base64
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

from lockstep.engine.request import SamplingParams
from tests.serve.server import running, wait_until

TEXTS = ["def read_lines(path):\n", "import os\n", "for i in range(10):\n    print(i)\n" * 12, "été 🙂"]


@pytest.fixture(scope="module")
def server():
    with running() as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server, **body):
    return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


def vectors(answer):
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return np.array([each["embedding"] for each in answer["data"]], np.float32)


def test_the_client_gets_the_same_bits_in_every_form_and_company(server, client):
    together = client.embeddings.create(model="lockstep", input=TEXTS)  # base64, as the client prefers
    expected = np.array([each.embedding for each in together.data], np.float32)
    assert expected.shape == (4, server.service.llm.model.config.hidden_size)
    assert np.abs(np.linalg.norm(expected.astype(np.float64), axis=1) - 1).max() < 1e-6
    ids = [server.service.tokenizer.encode(text) for text in TEXTS]
    assert together.usage.prompt_tokens == together.usage.total_tokens == sum(map(len, ids))
    assert vectors(post(server, input=TEXTS, encoding_format="float").json()).tobytes() == expected.tobytes()
    assert vectors(post(server, input=ids).json()).tobytes() == expected.tobytes()

    def alone(i):
        return client.embeddings.create(model="lockstep", input=(TEXTS, ids)[i % 2][i // 2], encoding_format="float")

    with ThreadPoolExecutor(8) as pool:
        for i, made in enumerate(pool.map(alone, range(8))):
            assert np.array(made.data[0].embedding, np.float32).tobytes() == expected[i // 2].tobytes()


def test_it_is_what_llm_embed_gives(server):
    found = {
        name: vectors(post(server, input=TEXTS, **options).json())
        for name, options in dict(last={}, mean=dict(pooling="mean"), raw=dict(normalize=False)).items()
    }
    hidden = [request_vectors(server, TEXTS, "last", False), request_vectors(server, TEXTS, "mean", True)]
    assert found["raw"].tobytes() == hidden[0].tobytes() and found["mean"].tobytes() == hidden[1].tobytes()
    assert np.abs(found["last"] - found["raw"] / np.linalg.norm(found["raw"], axis=1, keepdims=True)).max() < 1e-6


def request_vectors(server, texts, pooling, normalize):
    prompts = [(server.service.tokenizer.encode(text), SamplingParams(pooling=pooling)) for text in texts]
    streams = server.service.engine.submit_all(prompts)
    assert all(list(stream) == [] and stream.finish_reason == "embedded" for stream in streams)
    return np.stack([stream.request.pool.embedding(normalize) for stream in streams])


def test_the_shape_of_an_answer(server):
    answer = post(server, input="x", encoding_format="base64", user="me", dimensions=None).json()
    assert set(answer) == {"object", "data", "model", "system_fingerprint", "usage"} and answer["object"] == "list"
    assert answer["system_fingerprint"] == server.service.fingerprint and answer["data"][0]["object"] == "embedding"
    raw = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert raw.tobytes() == vectors(post(server, input=["x"]).json())[0].tobytes()


@pytest.mark.parametrize("body, status, param, said", [
    (dict(), 400, "input", "required"), (dict(input=""), 400, "input", "at least one token"),
    (dict(input=[]), 400, "input", "at least one token"), (dict(input=["x", ""]), 400, "input", "at least one token"),
    (dict(input=[[]]), 400, "input", "at least one token"), (dict(input=7), 400, "input", "expected a string"),
    (dict(input=["x", 7]), 400, "input", "expected a string"), (dict(input=[7, "x"]), 400, "input", "token ids"),
    (dict(input=[[1], [4096]]), 400, "input", "token ids from 0 to 4095, got 4096"),
    (dict(input=[-1]), 400, "input", "got -1"), (dict(input=[True]), 400, "input", "got true"),
    (dict(input="x", encoding_format="int8"), 400, "encoding_format", "'float' or 'base64'"),
    (dict(input="x", dimensions=8), 400, "dimensions", "cannot be shortened to 8"),
    (dict(input="x", pooling="max"), 400, "pooling", "'last' or 'mean'"),
    (dict(input=[5] * 1025), 400, "input", "more than the context of 1024"),
    (dict(input=["x"] * 257), 400, "input", "at most 256 inputs"),
    (dict(input="x", model="other"), 404, "model", "there is no 'other'"),
])  # fmt: skip
def test_a_mistake_is_named(server, body, status, param, said):
    answer = post(server, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and said in error["message"]
    wait_until(lambda: not server.service.generations and not server.service.num_queued_tokens)


def test_the_whole_context_fits_and_is_counted(server):
    before = server.service.metrics.prompt_tokens
    assert post(server, input=[5] * 1024, dimensions=server.service.llm.model.config.hidden_size).status_code == 200
    wait_until(lambda: server.service.metrics.prompt_tokens == before + 1024)
