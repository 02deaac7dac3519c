"""The effect of fields on the answers of a server."""

import json
import re

import httpx
import numpy as np
import pytest

from lockstep import SamplingParams
from lockstep.engine.request import Request
from lockstep.engine.sampling import Refused
from lockstep.serve.errors import not_generated
from lockstep.serve.fields.prompts import shortened
from lockstep.text.token_masks import TokenMask
from tests.serve.chatting import HELLO
from tests.serve.server import running

PROMPT = "def read_lines(path):\n"
ASKED = {
    "/v1/completions": dict(prompt=PROMPT),
    "/v1/chat/completions": dict(messages=HELLO),
    "/v1/responses": dict(input="hello"),
    "/v1/messages": dict(messages=HELLO, max_tokens=12),
}
TOKENS = ("prompt_tokens", "input_tokens", "cache_read_input_tokens", "completion_tokens", "output_tokens")
by_route = pytest.mark.parametrize("path", ASKED)


def post(server, path="/v1/completions", status=200, **body):
    found = httpx.post(server.url + path, json=ASKED.get(path, {}) | body, timeout=120)
    assert found.status_code == status, found.text
    return found.json()


def length(path, count):
    """The name of a route's field for the most tokens of an answer."""
    return {"max_output_tokens" if path == "/v1/responses" else "max_tokens": count}


def text_of(answer):
    """The text of an answer of any route."""
    if "output" in answer:
        return answer["output"][0]["content"][0]["text"]
    if "content" in answer:
        return answer["content"][0]["text"]
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@by_route
def test_a_seed_of_minus_one_draws_another_answer_each_time(server, path):
    found = {
        text_of(post(server, path, temperature=1.5, seed=-1, ignore_eos=True, **length(path, 12))) for _ in range(4)
    }
    assert len(found) > 1


@by_route
@pytest.mark.parametrize("count", [-1, None, 2**31 - 1])
def test_an_answer_may_fill_the_context(server, path, count):
    usage = post(server, path, temperature=0, ignore_eos=True, **length(path, count))["usage"]
    assert sum(usage.get(name, 0) for name in TOKENS) == 1024


def test_an_answer_may_fill_a_kv_cache_that_is_smaller_than_the_context():
    with running(max_context=1024, kv_tokens=300) as made:
        for path in ASKED:
            usage = post(made, path, temperature=0, ignore_eos=True, **length(path, -1))["usage"]
            assert sum(usage.get(name, 0) for name in TOKENS) == made.service.max_context == 320
        assert post(made, prompt=[5] * 320, status=400)["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_n_cmpl_gives_as_many_choices(server, path):
    assert len(post(server, path, n_cmpl=3, n=2, temperature=1, max_tokens=2)["choices"]) == 3


@by_route
def test_a_temperature_near_nothing_is_the_least_there_is(server, path):
    asked = dict(seed=5, **length(path, 12))
    least = text_of(post(server, path, temperature=1e-3, **asked))
    assert text_of(post(server, path, temperature=1e-9, **asked)) == least


@by_route
def test_tokens_may_be_left_out(server, llm, path):
    allowed = [llm.encode(" x")[-1], llm.encode(" y")[-1]]
    found = text_of(post(server, path, temperature=1, seed=1, allowed_token_ids=allowed, **length(path, 9)))
    assert set(found) <= set(" xy") and found
    free = text_of(post(server, path, temperature=0, **length(path, 12)))
    words = [llm.tokenizer.decode([i]) for i in llm.encode(free)]
    bad = next(word.strip() for word in words if word.strip())
    without = text_of(post(server, path, temperature=0, bad_words=[bad], **length(path, 12)))
    assert without != free


def test_a_grammar_and_left_out_tokens_hold_together(server, llm):
    asked = dict(guided_regex="[ab]{6}", temperature=1, seed=3, max_tokens=20)
    [b] = llm.encode("b")
    assert "a" in text_of(post(server, **asked))
    assert text_of(post(server, **asked, allowed_token_ids=[b, *llm.engine.eos_ids])) == "bbbbbb"
    gbnf = dict(temperature=1, seed=3, max_tokens=20, grammar='root ::= "-" letter{6}\nletter ::= [ab] # one of two')
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert re.fullmatch("-[ab]{6}", text_of(post(server, path, **gbnf)))
        wrong = post(server, path, **gbnf | dict(grammar="root ::= letter"), status=400)
        assert "rule letter, which is nowhere given" in wrong["error"]["message"]
        assert text_of(post(server, path, temperature=0, grammar="")) == text_of(post(server, path, temperature=0))
    schema = dict(type="object", properties=dict(x=dict(enum=[5])), required=["x"], additionalProperties=False)
    assert text_of(post(server, json_schema=schema, temperature=0, max_tokens=40)) == text_of(
        post(server, guided_json=schema, temperature=0, max_tokens=40)
    )


def bits(mask, output_ids):
    """The token ids that a mask allows."""
    return set(np.flatnonzero(np.unpackbits(mask(output_ids).view(np.uint8), bitorder="little")).tolist())


def test_a_mask_leaves_out_the_last_token_of_each_sequence():
    mask = TokenMask(70, None, [[5], [1, 2], [3, 1, 2], [69]])
    rest = set(range(70)) - {5, 69}
    assert bits(mask, []) == bits(mask, [2]) == rest and bits(mask, [1]) == bits(mask, [9, 3, 1]) == rest - {2}
    assert bits(mask, [2]) == rest  # the mask has no state of earlier answers
    assert bits(TokenMask(70, [1, 5, 64], [[5]]), []) == {1, 64}
    inner = np.zeros(3, np.int32)
    inner[0] = 0b110
    assert bits(TokenMask(70, [1, 5], [], lambda output_ids: inner), []) == {1}
    assert bits(TokenMask(70, [1, 5], [], lambda output_ids: None), []) == {1, 5}
    only = lambda *ids: TokenMask(70, ids, [])
    assert bits(TokenMask(70, [1], [], only(5, 69), ends=[69]), []) == {69}
    assert bits(TokenMask(70, [1], [], only(1, 5, 69), ends=[69]), []) == {1}
    assert bits(TokenMask(70, [1], [], only(5), ends=[69]), []) == set()


@by_route
def test_a_complete_grammar_ends_the_answer_whatever_else_is_asked_for(server, llm, path):
    a, b = llm.encode("a") + llm.encode("b")
    schema = dict(type="object", properties=dict(x=dict(enum=[5])), required=["x"], additionalProperties=False)
    forms = {
        "/v1/responses": dict(text=dict(format=dict(type="json_schema", name="x", schema=schema, strict=True))),
        "/v1/messages": dict(output_config=dict(format=dict(type="json_schema", schema=schema))),
    }
    form = forms.get(path, dict(guided_json=schema))
    plain = text_of(post(server, path, temperature=0, **form, **length(path, 60)))
    found = post(server, path, temperature=0, ignore_eos=True, **form, **length(path, 60))
    assert text_of(found) == plain and json.loads(plain) == dict(x=5)
    assert sum(found["usage"].get(name, 0) for name in TOKENS[3:]) < 60
    if path in forms:
        return
    if path == "/v1/chat/completions":
        tools = [dict(type="function", function=dict(name="f", parameters=schema, strict=True))]
        called = post(
            server,
            path,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=0,
            ignore_eos=True,
            max_tokens=200,
        )
        assert called["choices"][0]["finish_reason"] == "tool_calls" and called["usage"]["completion_tokens"] < 200
    asked = dict(temperature=1, seed=2, ignore_eos=True, max_tokens=30)
    free = post(server, path, guided_regex="[ab]*", **asked)
    assert free["choices"][0]["finish_reason"] == "length" and free["usage"]["completion_tokens"] == 30
    short = post(server, path, guided_regex="[ab]{3}", allowed_token_ids=[a, b], **asked)
    assert len(text_of(short)) == 3 and short["choices"][0]["finish_reason"] == "stop"


@by_route
def test_an_answer_without_a_token_left_is_an_error_that_names_the_fields(server, llm, path):
    [a] = llm.encode("a")
    schema = dict(type="object", required=["x"], properties=dict(x=dict(enum=[5])), additionalProperties=False)
    name, form = {
        "/v1/responses": ("text.format", dict(text=dict(format=dict(type="json_schema", name="x", schema=schema)))),
        "/v1/messages": ("output_format", dict(output_format=dict(type="json_schema", schema=schema))),
    }.get(path, ("guided_regex", dict(guided_regex="ba+")))
    every = [i for i in range(llm.model.config.vocab_size) if i != a and i not in llm.engine.eos_ids]
    for field, fields in (
        ("allowed_token_ids", dict(allowed_token_ids=[a])),
        ("suppress_tokens", dict(suppress_tokens=every[:1024])),
    ):
        asked = form | fields | dict(temperature=0, **length(path, 20))
        error = post(server, path, **asked, status=400)["error"]
        assert error["message"] == (
            f"{field}: the answer cannot go on, there is no token left that {field} and {name} allow"
        )
        if path != "/v1/messages":
            assert (error["param"], error["code"]) == (field, "generation_failed")
        streamed = httpx.post(server.url + path, json=ASKED[path] | asked | dict(stream=True), timeout=120)
        assert f"{field}: the answer cannot go on" in streamed.text and "logits_mask" not in streamed.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prompt_logprobs_are_the_engines_own_bits(server, llm, path):
    answer = post(server, path, max_tokens=1, temperature=0, prompt_logprobs=2, return_token_ids=True)
    plain = post(server, path, max_tokens=1, temperature=0, return_token_ids=True)
    ids = (answer["choices"][0] if path == "/v1/completions" else answer)["prompt_token_ids"]
    [expected] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=2))
    first, *found = (answer["choices"][0] if path == "/v1/completions" else answer)["prompt_logprobs"]
    assert (
        first is None
        and [each[str(i)]["logprob"] for i, each in zip(ids[1:], found, strict=True)] == expected.prompt_logprobs
    )
    for token_id, each, top in zip(ids[1:], found, expected.prompt_top_logprobs, strict=True):
        ranked = {int(i): known["logprob"] for i, known in each.items() if known["rank"] is not None}
        assert ranked == top and set(each) == {*map(str, top), str(token_id)}
        assert each[str(token_id)]["decoded_token"] == llm.tokenizer.decode([token_id], skip_special_tokens=False)
    assert text_of(answer) == text_of(plain)


def test_prompts_are_cut_where_that_is_asked_for(server, llm):
    text = "x = 1\n" * 600
    ids = llm.encode(text)
    found = post(server, prompt=text, truncate_prompt_tokens=20, max_tokens=3, return_token_ids=True, echo=True)
    [choice] = found["choices"]
    assert choice["prompt_token_ids"] == ids[-20:] and choice["text"].startswith(llm.tokenizer.decode(ids[-20:]))
    for count, room in ((5, 5), (-1, 1), (None, 1), (5000, 1)):
        asked = dict(prompt=[ids], truncate_prompt_tokens=-1, max_tokens=count, return_token_ids=True)
        assert post(server, **asked)["choices"][0]["prompt_token_ids"] == ids[room - 1024 :]
    assert post(server, prompt=text, max_tokens=5, status=400)["error"]["code"] == "context_length_exceeded"
    for most in (2000, 1024):  # of a prompt of more
        refused = post(server, prompt=[ids], truncate_prompt_tokens=most, max_tokens=30, status=400)["error"]
        assert (refused["param"], refused["code"]) == ("prompt", "context_length_exceeded")
        assert f"it has {min(most, len(ids))} tokens, which leaves no room for an answer" in refused["message"]
    vector, first = (
        post(server, "/v1/embeddings", input=given, **more)["data"][0]["embedding"]
        for given, more in ((text, dict(truncate_prompt_tokens=20)), (ids[:20], {}))
    )
    assert vector == first
    post(server, "/v1/embeddings", input=text, truncate_prompt_tokens=-1.0)


class Marked:
    """A tokenizer that puts 1 before and 2 after the characters of a text."""

    tokenizer = None

    def encode(self, text, add_special_tokens=True):
        ids = [ord(character) for character in text]
        return [1, *ids, 2] if add_special_tokens else ids


def test_what_is_around_a_text_stays_when_it_is_cut():
    service, ids = Marked(), Marked().encode("abcdef")
    service.tokenizer = service
    assert shortened(service, "abcdef", ids, 5, keep_end=True) == [1, *b"def", 2]
    assert shortened(service, "abcdef", ids, 5, keep_end=False) == [1, *b"abc", 2]
    assert shortened(service, "abcdef", ids, 8, keep_end=True) == ids
    assert shortened(service, ids, ids, 3, keep_end=True) == ids[-3:]
    with pytest.raises(Exception, match="more than the 2 tokens that are put around"):
        shortened(service, "abcdef", ids, 2, keep_end=True)


def test_token_ids_may_be_written_with_a_point(server, llm):
    ids = llm.encode(PROMPT)
    expected = text_of(post(server, prompt=ids, temperature=0))
    assert text_of(post(server, prompt=[float(i) for i in ids], temperature=0)) == expected
    post(server, "/v1/embeddings", input=[float(i) for i in ids])
    assert post(server, "/detokenize", tokens=[float(i) for i in ids])["prompt"] == PROMPT
    assert "token ids from 0" in post(server, prompt=[5.5], status=400)["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_every_chunk_has_the_usage_so_far_where_that_is_asked_for(server, path):
    asked = ASKED[path] | dict(max_tokens=9, ignore_eos=True, stream=True, n=2, temperature=1, seed=1)
    options = dict(include_usage=True, continuous_usage_stats=True)
    text = httpx.post(server.url + path, json=asked | dict(stream_options=options), timeout=120).text
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    for index in range(2):
        mine = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in mine]
        assert counts == sorted(counts) and counts[-1] == 9
        assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in mine)
        assert {usage["prompt_tokens"] for usage in mine} == {last["usage"]["prompt_tokens"]}
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 18
    del options["include_usage"]
    text = httpx.post(server.url + path, json=asked | dict(stream_options=options), timeout=120).text
    assert '"usage"' not in text


def test_stop_in_messages_adds_to_stop_sequences(server):
    text = text_of(post(server, "/v1/messages", temperature=0))
    end = text[3]
    for fields in (dict(stop=end), dict(stop_sequences=["", end]), dict(stop=["never"], stop_sequences=[end])):
        found = post(server, "/v1/messages", temperature=0, **fields)
        assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", end)


def test_a_message_is_continued_without_a_prompt_for_another(server):
    messages = [*HELLO, dict(role="assistant", content="Well")]
    asked = dict(messages=messages, temperature=0, max_tokens=5, continue_final_message=True)
    plain = post(server, "/v1/chat/completions", **asked)
    assert text_of(post(server, "/v1/chat/completions", add_generation_prompt=False, **asked)) == text_of(plain)
    refused = post(server, "/v1/chat/completions", add_generation_prompt=False, status=400)
    assert refused["error"]["param"] == "add_generation_prompt"


def test_a_grammar_that_cannot_be_followed_is_named_and_a_fault_of_ours_is_not():
    def failed(cause):
        request = Request(0, [1], SamplingParams())
        request.refused = Refused(f"logits_mask raised {type(cause).__name__}: {cause}")
        request.refused.__cause__, request.error = cause, str(request.refused)
        return not_generated(request, ["bad_words", "guided_regex"])

    error = failed(ValueError("grammar: too much work"))
    assert (error.status, error.message, error.param) == (400, "guided_regex: too much work", "guided_regex")
    assert isinstance(failed(KeyError("x")), Refused)  # it is logged, and the client gets a 500 without details
