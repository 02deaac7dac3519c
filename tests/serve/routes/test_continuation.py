"""`continue_from`: an answer that goes on from its first tokens is the same, whole and streamed, on both routes; and
what cannot be the beginning of an answer is refused."""

import copy
import json
import time

import httpx
import pytest

from lockstep.engine.async_engine import EngineThread
from lockstep.serve import generation
from tests.serve.chatting import HELLO, PLOT, saying

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "class Queue:\n    def put(self, item):\n"
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")
SAMPLED = dict(temperature=0.9, seed=11, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=4, max_tokens=24)


@pytest.fixture(autouse=True)
def a_token_a_chunk(monkeypatch):
    """A step waits until the tokens of the step before are read by those who read a stream, and no frame is waited
    for: each chunk brings one token."""
    step = vars(EngineThread)["_step"]

    def is_read(stream):
        return not vars(stream)["_tokens"] or vars(stream)["_for_end"]

    def step_when_all_is_read(thread):
        streams = vars(vars(thread)["_advanced"].__self__)["_streams"]
        until = time.monotonic() + 60
        while not all(map(is_read, list(streams.values()))):
            assert time.monotonic() < until
            time.sleep(1e-4)
        step(thread)

    monkeypatch.setattr(EngineThread, "_step", step_when_all_is_read)
    monkeypatch.setattr(generation, "FRAME_SECONDS", 0)
    monkeypatch.setattr(generation, "EVENT_SECONDS", 0)


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body)


def whole(server, path, **body):
    """The answer, without what is new in each."""
    made = post(server, path, return_token_ids=True, **body).json()
    made["usage"].pop("prompt_tokens_details"), made["usage"].pop("completion_tokens_details", None)
    for choice in made["choices"]:
        for call in choice.get("message", {}).get("tool_calls", []):
            call.pop("id")
    return {name: made[name] for name in ("choices", "usage")}


def new_choice():
    return dict(text="", thought="", calls={}, ids=[], logprobs=[], reason=None)


def streamed(server, path, **body):
    """What a stream's chunks have together, {index of a choice: ...}; the same of choice 0 before each chunk with new
    tokens, which is what a client knows whose server is killed there; and the usage."""
    options = dict(stream=True, return_token_ids=True, stream_options=dict(include_usage=True))
    lines = [line[6:] for line in post(server, path, **options, **body).text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    found, before = {}, []
    for chunk in chunks:
        [choice] = chunk["choices"]
        made = found.setdefault(choice["index"], new_choice())
        if choice.get("token_ids") and choice["index"] == 0:
            before.append(copy.deepcopy(made))
        add(made, choice, choice.get("delta", choice))
    return found, before, {name: last["usage"][name] for name in USAGE}


def add(made, choice, delta):
    """Adds what a chunk brings to a choice."""
    made["text"] += delta.get("text") or delta.get("content") or ""
    made["thought"] += delta.get("reasoning_content") or ""
    add_calls(made["calls"], {call["index"]: call["function"] for call in delta.get("tool_calls", ())})
    made["ids"] += choice.get("token_ids", [])
    logprobs = choice.get("logprobs") or {}
    columns = [logprobs.get(name, ()) for name in ("tokens", "token_logprobs", "text_offset")]
    made["logprobs"] += logprobs.get("content") or list(zip(*columns, strict=True))
    made["reason"] = choice["finish_reason"] or made["reason"]


def add_calls(calls, more):
    for index, parts in more.items():
        of_call = calls.setdefault(index, dict(name="", arguments=""))
        for name, part in parts.items():
            of_call[name] += part


def joined(before, after):
    """What two parts of a choice have together, the second of which went on from the first."""
    made = copy.deepcopy(before)
    add_calls(made["calls"], after["calls"])
    for name in ("text", "thought", "ids", "logprobs"):
        made[name] += after[name]
    return made | dict(reason=after["reason"])


def check_stream(server, path, num_cuts, **body):
    """Cuts a stream at a few of its chunks and at its end, and checks that it goes on to what it was; returns that."""
    found, before, usage = streamed(server, path, **body)
    assert [len(each["ids"]) for each in before] == list(range(len(found[0]["ids"])))
    for known in [*before[1 :: -(-len(before) // num_cuts)], found[0]]:
        rest, _, usage_of_rest = streamed(server, path, continue_from=known["ids"], **body)
        assert joined(known, rest[0]) == found[0] and usage_of_rest == usage
    return found[0]


CASES = {
    "penalties": (COMPLETIONS, dict(prompt=PROMPT, logprobs=2, **SAMPLED)),
    "stop": (COMPLETIONS, dict(prompt=PROMPT, temperature=0, max_tokens=40, stop=["\n\n", "return self"])),
    "echo": (COMPLETIONS, dict(prompt=PROMPT, logprobs=0, echo=True, temperature=0, max_tokens=8)),
    "regex": (CHAT, dict(messages=HELLO, temperature=0.9, seed=3, guided_regex="[a-e]{4,9}!", logprobs=True)),
    "schema": (
        CHAT,
        dict(
            messages=HELLO,
            seed=5,
            temperature=1,
            max_tokens=60,
            response_format=dict(
                type="json_schema",
                json_schema=dict(name="p", strict=True, schema=PLOT["parameters"]),
            ),
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_that_goes_on_is_the_same_as_a_whole_one(server, case):
    path, body = CASES[case]
    uninterrupted = whole(server, path, **body)
    [choice] = uninterrupted["choices"]
    ids = choice["token_ids"]
    for cut in sorted({1, len(ids) // 2, len(ids)}):
        assert whole(server, path, continue_from=ids[:cut], **body) == uninterrupted


@pytest.mark.parametrize("case", CASES)
def test_a_stream_that_goes_on_brings_the_rest(server, case):
    path, body = CASES[case]
    check_stream(server, path, 2, **body)


THOUGHT = "<think>\nhmm 1 < 2</think>\n\nso:"
CALL = '<tool_call>\n{"name": "plot", "arguments": {"x": 7, "side": "left"}}\n</tool_call>'


@pytest.mark.parametrize(("max_tokens", "reason"), [(200, "tool_calls"), (48, "length")])
def test_thoughts_and_calls_go_on_wherever_they_were_cut(thinker, max_tokens, reason):
    body = dict(messages=HELLO, temperature=0, max_tokens=max_tokens, tools=[dict(type="function", function=PLOT)])
    with saying(thinker, f"{THOUGHT}\n{CALL}"):
        found = check_stream(thinker, CHAT, 5, **body)
        uninterrupted = whole(thinker, CHAT, **body)
        assert whole(thinker, CHAT, continue_from=found["ids"][: len(found["ids"]) // 2], **body) == uninterrupted
    assert found["reason"] == reason and found["thought"] == "hmm 1 < 2" and found["calls"][0]["name"] == "plot"


def test_choices_go_on_each_from_its_own_tokens(server):
    body = dict(prompt=[PROMPT, "import os\n"], n=2, **SAMPLED)
    uninterrupted = whole(server, COMPLETIONS, **body)
    lists = [choice["token_ids"][: 7 * i] for i, choice in enumerate(uninterrupted["choices"])]
    assert whole(server, COMPLETIONS, continue_from=lists, **body) == uninterrupted
    found, _, _ = streamed(server, COMPLETIONS, continue_from=lists, **body)
    assert [found[i]["ids"] for i in range(4)] == [
        c["token_ids"][7 * i :] for i, c in enumerate(uninterrupted["choices"])
    ]


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(continue_from=5), "expected an array"),
        (dict(continue_from=["x"]), "expected token ids from 0 to"),
        (dict(continue_from=[1 << 30]), "expected token ids from 0 to"),
        (dict(continue_from=[[1], 2], n=2), "expected an array of token ids, got 2"),
        (dict(continue_from=[1, 2], n=2), "token ids of each of 2 choices, got token ids of one"),
        (dict(continue_from=[[1]], n=2), "token ids of each of 2 choices, got an array of 1"),
        (
            dict(continue_from=[[5], [0, 5]], n=2),
            "sample 1: the answer ends (0) before its token 1, 5",
        ),
        (dict(continue_from=[0, 5]), "the answer ends (0) before its token 1, 5"),
        (dict(continue_from=[5, 6, 7], max_tokens=2), "expected at most max_tokens, 2, got 3 tokens"),
        (dict(continue_from=[5], max_tokens=0), "expected none with max_tokens 0"),
        (
            dict(continue_from=[5], suppress_tokens=[5]),
            "token 0, 5, is not allowed there by suppress_tokens",
        ),
        (
            dict(continue_from=[5], guided_choice=["yes"]),
            "token 0, 5, is not allowed there by guided_choice",
        ),
        (
            dict(continue_from=[5], temperature=1, seed=None),
            "expected the seed of the answer that goes on",
        ),
    ],
)
def test_what_cannot_begin_an_answer_is_refused(server, more, message):
    answer = post(server, COMPLETIONS, **dict(prompt="x", max_tokens=8, temperature=0, stop_token_ids=[0]) | more)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("continue_from") and message in error["message"], (
        error
    )


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_routes_that_tell_no_token_ids_refuse_them(server, path):
    prompt = dict(input="x") if path == "/v1/responses" else dict(messages=HELLO, max_tokens=4)
    answer = post(server, path, continue_from=[5], **prompt)
    assert answer.status_code == 400 and "use /v1/completions" in answer.json()["error"]["message"]


def test_none_means_that_answers_begin_anew(server):
    body = dict(prompt="x", max_tokens=4, temperature=0)
    made = [
        whole(server, COMPLETIONS, **body | more) for more in ({}, dict(continue_from=None), dict(continue_from=[]))
    ]
    assert made[0] == made[1] == made[2] == whole(server, COMPLETIONS, continue_from=[[]], **body)
