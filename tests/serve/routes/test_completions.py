"""/v1/completions with the openai client: all kinds of requests, compared bit for bit with LLM.generate."""

import json
import re

import httpx
import openai
import pytest

from lockstep import SamplingParams

PROMPT = "def read_lines(path):\n"
PROMPTS = [PROMPT, "import os\n", "class Queue:\n    ", "x"]
GREEDY = dict(model="lockstep", temperature=0)


def generated(llm, prompt, **params):
    return llm.generate([prompt], SamplingParams(**params))[0]


def post(server, **body):
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


@pytest.mark.parametrize("form", ["string", "strings", "ids", "lists of ids"])
def test_prompts_in_all_forms(client, llm, form):
    ids = [llm.encode(p) for p in PROMPTS]
    prompt = {"string": PROMPT, "strings": PROMPTS, "ids": ids[0], "lists of ids": ids}[form]
    made = client.completions.create(prompt=prompt, max_tokens=20, **GREEDY)
    expected = [generated(llm, p, max_tokens=20) for p in (PROMPTS[:1] if form in ("string", "ids") else PROMPTS)]
    assert [c.text for c in made.choices] == [e.text for e in expected]
    assert [c.index for c in made.choices] == list(range(len(expected)))
    assert [c.finish_reason for c in made.choices] == [e.finish_reason for e in expected]
    assert made.usage.prompt_tokens == sum(map(len, ids[: len(expected)]))
    assert made.usage.completion_tokens == sum(len(e.token_ids) for e in expected)
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.object == "text_completion" and made.id.startswith("cmpl-") and made.model == "lockstep"


@pytest.mark.parametrize(
    "changed",
    [
        dict(temperature=0.4),
        dict(top_p=0.3),
        dict(top_k=2),
        dict(min_p=0.5),
        dict(seed=8),
        dict(repetition_penalty=1.5),
        dict(presence_penalty=2.0),
        dict(frequency_penalty=2.0),
        dict(stop=["e", "zzz"]),
        dict(logit_bias={199: 100.0}),
        dict(stop_token_ids=[199], logit_bias={199: 100.0}),
        dict(stop="e", min_tokens=30),
        dict(max_tokens=3),
        dict(stop="e", include_stop_str_in_output=True),
    ],
    ids=str,
)
def test_every_sampling_field_reaches_the_engine(server, llm, changed):
    common = dict(max_tokens=40, temperature=1.2, seed=7)
    fields = common | changed
    bias = {str(i): b for i, b in fields.get("logit_bias", {}).items()}
    found = post(server, prompt=PROMPT, return_token_ids=True, **fields | dict(logit_bias=bias)).json()["choices"][0]
    expected = generated(llm, PROMPT, **fields)
    assert (found["text"], found["token_ids"]) == (expected.text, expected.token_ids)
    assert found["prompt_token_ids"] == expected.prompt_token_ids
    last = list(changed)[-1]  # the field must change the answer, or the comparison above would prove little
    other = generated(llm, PROMPT, **{k: v for k, v in fields.items() if k != last})
    assert (expected.text, expected.token_ids) != (other.text, other.token_ids)


def test_ignore_eos_goes_on_to_max_tokens(server, llm):
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    found = post(server, prompt=prompt, max_tokens=200, temperature=0, ignore_eos=True).json()
    assert found["usage"]["completion_tokens"] == 200 > len(generated(llm, prompt, max_tokens=200).token_ids)


def test_samples_have_seeds_of_their_own_and_the_same_seed_gives_the_same(client, llm):
    fields = dict(max_tokens=12, temperature=1.0, seed=5, n=3)
    made = client.completions.create(model="lockstep", prompt=PROMPTS[:2], **fields)
    expected = [s.text for p in PROMPTS[:2] for s in generated(llm, p, **fields).samples]
    assert [c.text for c in made.choices] == expected and len(set(expected)) > 3
    again = client.completions.create(model="lockstep", prompt=PROMPTS[:2], **fields)
    assert [c.text for c in again.choices] == expected


def test_without_a_seed_answers_differ(client):
    texts = {
        client.completions.create(model="lockstep", prompt=PROMPT, max_tokens=20, temperature=1).choices[0].text
        for _ in range(4)
    }
    assert len(texts) > 1


# ---------------------------------------------------------------- log-probabilities


def test_logprobs_of_an_answer_are_the_engines_own_bits(client, llm):
    made = client.completions.create(prompt=PROMPT, max_tokens=15, logprobs=4, **GREEDY).choices[0]
    expected = generated(llm, PROMPT, max_tokens=15, logprobs=4)
    assert made.logprobs.token_logprobs == expected.logprobs
    for found, top, chosen in zip(made.logprobs.top_logprobs, expected.top_logprobs, expected.logprobs, strict=True):
        assert max(found.values()) == max(top.values()) == chosen  # greedy, as lm-eval looks for it
        assert set(found.values()) <= set(top.values()) and len(found) <= 4
    assert "".join(made.logprobs.tokens) == made.text == expected.text
    assert [
        made.text[at : at + len(t)] for at, t in zip(made.logprobs.text_offset, made.logprobs.tokens, strict=True)
    ] == made.logprobs.tokens


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_has_the_logprobs_of_the_prompt_first_null(client, llm, as_ids, max_tokens):
    text = PROMPT * 6
    prompt = [llm.encode(text)] if as_ids else text
    made = client.completions.create(prompt=prompt, max_tokens=max_tokens, logprobs=1, echo=True, seed=1234, **GREEDY)
    expected = generated(llm, text, max_tokens=max(1, max_tokens), logprobs=1, prompt_logprobs=1)
    output = expected.logprobs[:max_tokens]
    found = made.choices[0].logprobs
    assert found.token_logprobs == [None, *expected.prompt_logprobs, *output]
    assert found.top_logprobs[0] is None
    tops = [*expected.prompt_top_logprobs, *expected.top_logprobs[:max_tokens]]
    for alternatives, top, logprob in zip(found.top_logprobs[1:], tops, found.token_logprobs[1:], strict=True):
        assert set(alternatives.values()) == {*top.values(), logprob}
        assert max(alternatives.values()) == max(top.values())
    assert made.choices[0].text == text + (expected.text if max_tokens else "")
    assert len(found.tokens) == len(found.text_offset) == len(expected.prompt_token_ids) + max_tokens
    assert made.usage.completion_tokens == max_tokens and made.choices[0].finish_reason == "length"


def test_tokens_that_are_no_text_are_named_by_their_bytes(client, llm):
    ids = llm.encode("x = '\N{SNOWMAN}\N{PILE OF POO}'")
    made = client.completions.create(prompt=ids, max_tokens=0, logprobs=0, echo=True, **GREEDY).choices[0]
    raw = [llm.tokenizer.token_bytes(i) for i in ids]
    shown = [t for t in made.logprobs.tokens if t.startswith("bytes:")]
    assert shown and len(shown) == sum(b.decode("utf-8", "replace").encode() != b for b in raw)
    assert all(
        list(top) == [token]
        for top, token in zip(made.logprobs.top_logprobs[1:], made.logprobs.tokens[1:], strict=True)
    )


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(n=2, temperature=1.0, seed=3),
        dict(logprobs=2),
        dict(echo=True),
        dict(echo=True, logprobs=1),
        dict(max_tokens=0, echo=True, logprobs=1),
        dict(stop=["return"]),
    ],
    ids=str,
)
def test_a_stream_is_the_whole_answer_in_pieces(client, fields):
    asked = {**GREEDY, "prompt": PROMPTS[:2], "max_tokens": 25, **fields}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(stream=True, stream_options=dict(include_usage=True), **asked))
    *pieces, last = pieces
    assert last.choices == [] and last.usage == whole.usage and all(p.usage is None for p in pieces)
    assert {p.id for p in pieces} == {last.id} and {p.object for p in pieces} == {"text_completion"}
    for choice in whole.choices:
        mine = [c for p in pieces for c in p.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        if choice.logprobs:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [each for c in mine for each in getattr(c.logprobs, name)] == getattr(choice.logprobs, name)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_has_the_ids_of_tokens_whose_text_is_held_back(server, path):
    asked = dict(max_tokens=30, temperature=0, return_token_ids=True, ignore_eos=True)
    asked |= dict(prompt=PROMPT) if path == "completions" else dict(messages=[dict(role="user", content=PROMPT)])
    url = f"{server.url}/v1/{path}"
    [whole] = httpx.post(url, json=asked, timeout=120).json()["choices"]
    text = whole["text"] if path == "completions" else whole["message"]["content"]
    asked |= dict(stream=True, stop=text + "?")  # every token may begin it, until the last was something else
    with httpx.stream("POST", url, json=asked, timeout=120) as got:
        events = [json.loads(line[6:]) for line in got.iter_lines() if line.startswith("data: {")]
    pieces = [piece for event in events for piece in event["choices"]]
    assert [i for piece in pieces for i in piece.get("token_ids", [])] == whole["token_ids"]
    assert "".join(piece.get("text") or piece.get("delta", {}).get("content", "") for piece in pieces) == text


def test_a_stream_ends_with_done_and_carries_usage_only_when_asked(server):
    sent = dict(prompt="x", max_tokens=3, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=sent, timeout=60) as got:
        lines = [line for line in got.iter_lines() if line]
    assert got.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_cached_tokens_are_reported(server):
    prompt = "".join(f"value_{i} = {i}\n" for i in range(80))
    first, second = (post(server, prompt=prompt, max_tokens=1, cache_salt="mine").json()["usage"] for _ in range(2))
    other = post(server, prompt=prompt, max_tokens=1, cache_salt="theirs").json()["usage"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, second, other)]
    assert cached == [0, 512, 0] and first["prompt_tokens"] > 512


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields, param, says",
    [
        (dict(suffix="end"), "suffix", "not supported"),
        (dict(best_of=4), "best_of", "got 4"),
        (dict(allowed_token_ids=[]), "allowed_token_ids", "at least one"),
        (dict(allowed_token_ids=[4096]), "allowed_token_ids", "from 0 to 4095"),
        (dict(bad_words=["x", " "]), "bad_words", "1 to 256 characters"),
        (dict(bad_words=["x"] * 1025), "bad_words", "at most 1024"),
        (dict(prompt_logprobs=21), "prompt_logprobs", "0 to 20"),
        (dict(prompt_logprobs=1, stream=True), "prompt_logprobs", "stream to be false"),
        (dict(prompt_logprobs=1, echo=True, logprobs=1), "prompt_logprobs", "beside echo"),
        (dict(truncate_prompt_tokens=0), "truncate_prompt_tokens", "at least 1, or -1"),
        (dict(logprobs=21), "logprobs", "at most 20"),
        (dict(logprobs=-1), "logprobs", "greater than or equal to 0"),
        (dict(n=0), "n", "got 0"),
        (dict(n=0), "n", "greater than or equal to 1"),
        (dict(n=100000), "n", "n: expected at most 64, got 100000"),
        (dict(n=65), "n", "n: expected at most 64, got 65"),
        (dict(prompt=["x"] * 30, n=10), "n", "at most 256 samples"),
        (dict(prompt=["x"] * 257), "prompt", "at most 256 prompts"),
        (dict(prompt=[]), "prompt", "at least one token"),
        (dict(prompt=""), "prompt", "at least one token"),
        (dict(prompt=[""]), "prompt", "at least one token"),
        (dict(prompt=[[]]), "prompt", "at least one token"),
        (dict(prompt=[1, "x"]), "prompt", "token ids"),
        (dict(prompt=[True]), "prompt", "token ids"),
        (dict(prompt=["x", 1]), "prompt", "expected a string"),
        (dict(prompt={"text": "x"}), "prompt", "expected a string"),
        (dict(prompt=None), "prompt", "got null"),
        (dict(prompt=[-1]), "prompt", "got -1"),
        (dict(prompt=[4096]), "prompt", "0 to 4095"),
        (dict(prompt=[1 << 70]), "prompt", "0 to 4095"),
        (dict(max_tokens=-2), "max_tokens", "got -2"),
        (dict(max_tokens=0.5), "max_tokens", "got 0.5"),
        (dict(prompt="x " * 3000), "prompt", "context of 1024"),
        (dict(temperature=-0.1), "temperature", "got -0.1"),
        (dict(temperature="hot"), "temperature", "expected a number"),
        (dict(top_p=1.5), "top_p", "got 1.5"),
        (dict(top_k=-2), "top_k", "got -2"),
        (dict(seed=1 << 64), "seed", "seed"),
        (dict(seed=1.5), "seed", "got 1.5"),
        (dict(stop=["x"] * 17), "stop", "at most 16"),
        (dict(stop=["x" * 300]), "stop", "at most 256"),
        (dict(stop=5), "stop", "got 5"),
        (dict(stop_token_ids=[5000]), "stop_token_ids", "0 to 4095"),
        (dict(stop_token_ids=[-5]), "stop_token_ids[0]", "got -5"),
        (dict(logit_bias={"x": 1}), "logit_bias", "token ids as keys"),
        (dict(logit_bias={"-1": 1}), "logit_bias", "token ids as keys"),
        (dict(logit_bias={"5": 101}), "logit_bias", "got 101"),
        (dict(logit_bias={"5000": 1}), "logit_bias", "0 to 4095"),
        (dict(logit_bias={str(i): 1 for i in range(2000)}), "logit_bias", "at most 1024"),
        (dict(min_tokens=20, max_tokens=10), "min_tokens", "at most max_tokens"),
        (dict(stream="yes"), "stream", 'got "yes"'),
        (dict(echo=1), "echo", "got 1"),
        (dict(cache_salt="x" * 300), "cache_salt", "256 characters"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused_by_its_name(server, fields, param, says):
    got = post(server, **{"prompt": "x", "max_tokens": 4, **fields})
    error = got.json()["error"]
    assert got.status_code == 400 and error["param"] == param and says in error["message"], error
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_a_missing_prompt_and_another_model_are_refused(client, server):
    with pytest.raises(openai.BadRequestError, match="prompt: this field is required"):
        client.post("/completions", body={}, cast_to=object)
    with pytest.raises(openai.NotFoundError, match="there is no 'gpt-4o' here, only 'lockstep'") as caught:
        client.completions.create(model="gpt-4o", prompt="x")
    assert caught.value.code == "model_not_found"
    assert post(server, prompt="x" * 5000, max_tokens=1).json()["error"]["code"] == "context_length_exceeded"


def test_unknown_fields_are_ignored(server):
    got = post(server, prompt="x", max_tokens=1, user="me", metadata={"a": 1}, store=True, frobnicate=[None])
    assert got.status_code == 200


def test_answers_in_a_form(client):
    """Each sample of each prompt follows the format, and an invalid format is refused."""
    form = dict(extra_body=dict(guided_regex="[a-c]{2,4}-[0-9]"))
    options = dict(model="lockstep", prompt=PROMPTS, n=2, temperature=1, seed=1, max_tokens=20)
    made = client.completions.create(**options, **form)
    assert (
        all(re.fullmatch("[a-c]{2,4}-[0-9]", choice.text) and choice.finish_reason == "stop" for choice in made.choices)
        and len({choice.text for choice in made.choices}) > 2
    )
    free = client.completions.create(prompt=PROMPT, extra_body=dict(response_format=dict(type="text")), **GREEDY)
    assert free.choices[0].text == client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    with pytest.raises(openai.BadRequestError, match="unclosed"):
        client.completions.create(prompt=PROMPT, extra_body=dict(guided_regex="["), **GREEDY)
