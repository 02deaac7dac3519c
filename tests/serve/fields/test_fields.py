"""Fields of requests: equivalent values, defaults, and fields of other servers that this one refuses by name."""

import re
from pathlib import Path

import pytest

from lockstep.serve.errors import ApiError
from lockstep.serve.fields.body import Fields, check
from lockstep.serve.fields.chat import ChatFields, arguments_of
from lockstep.serve.fields.known import EMBEDDING, GENERATION, STRUCTURED
from lockstep.serve.fields.messages import MessagesFields
from lockstep.serve.fields.responses import ResponsesFields
from lockstep.serve.fields.sampling import most_tokens, sampling_params
from lockstep.serve.limits import Limits
from lockstep.serve.routes.completions import CompletionFields
from lockstep.serve.routes.embeddings import EmbeddingFields
from lockstep.serve.routes.tokens import TokenizeFields
from tests.serve.chatting import HELLO

DOCS = Path(__file__).parents[3] / "docs" / "server.md"
BODIES = {
    CompletionFields: dict(prompt="x"),
    ChatFields: dict(messages=HELLO),
    ResponsesFields: dict(input="x"),
    MessagesFields: dict(messages=HELLO, max_tokens=1),
    TokenizeFields: dict(prompt="x"),
    EmbeddingFields: dict(input="x"),
}
PATHS = {
    CompletionFields: "/v1/completions",
    ChatFields: "/v1/chat/completions",
    ResponsesFields: "/v1/responses",
    MessagesFields: "/v1/messages",
    TokenizeFields: "/tokenize",
    EmbeddingFields: "/v1/embeddings",
}
GENERATING = [CompletionFields, ChatFields, ResponsesFields, MessagesFields]
LENGTHS = {
    CompletionFields: ["n_predict", "max_completion_tokens", "max_tokens"],
    ChatFields: ["n_predict", "max_completion_tokens", "max_tokens"],
    ResponsesFields: ["max_output_tokens"],
    MessagesFields: ["max_tokens"],
}
by_route = pytest.mark.parametrize("route", BODIES, ids=PATHS.get)
by_generating_route = pytest.mark.parametrize("route", GENERATING, ids=PATHS.get)


def read(route, **fields):
    return check(route, BODIES[route] | fields)


def refusal(route, **fields):
    with pytest.raises(ApiError) as caught:
        read(route, **fields)
    assert caught.value.status == 400
    return caught.value


def params(route, **fields):
    return sampling_params(read(route, **fields), Limits(), 10, {})


# ---------------------------------------------------------------- equivalent values


@by_generating_route
def test_a_seed_of_minus_one_is_another_one_each_time(route):
    seeds = {params(route, seed=seed).seed for seed in [-1] * 10 + [-1.0] * 10 + [None] * 10}
    assert len(seeds) == 30 and min(seeds) >= 0
    assert [params(route, seed=seed).seed for seed in (-2, 0, 5, 5.0)] == [-2, 0, 5, 5]


@by_generating_route
@pytest.mark.parametrize("given", [-1, -1.0, None, 101, 2**31 - 1, 2**31, 2.0**40, 1 << 200])
def test_the_longest_answer_is_what_the_context_has_room_for(route, given):
    for name in LENGTHS[route]:
        fields = read(
            route, **{"max_tokens": 1} if name != "max_tokens" and route is MessagesFields else {}, **{name: given}
        )
        assert most_tokens(fields, 100, 16) == 100
        assert most_tokens(read(route, **{name: 7.0}), 100, 16) == 7


def test_without_a_length_completions_have_sixteen_tokens_and_conversations_all_the_room():
    assert most_tokens(read(CompletionFields), 100, 16) == 16
    assert most_tokens(read(CompletionFields), 10, 16) == 10
    assert most_tokens(read(ChatFields), 100) == 100
    assert most_tokens(read(ChatFields, max_tokens=None, n_predict=5), 100) == 5
    assert read(CompletionFields, max_tokens=0).is_empty and not read(CompletionFields, max_tokens=-1).is_empty
    with pytest.raises(ApiError, match="max_tokens: this field is required"):
        check(MessagesFields, dict(messages=HELLO))


@by_generating_route
@pytest.mark.parametrize("given", [-2, -5, 1.5, "5", True, [5]])
def test_a_length_that_is_none_is_refused(route, given):
    for name in LENGTHS[route]:
        assert refusal(route, **{name: given}).param == name


def fields_of(base=Fields):
    """All subclasses of Fields, direct or not."""
    for made in base.__subclasses__():
        yield from [made, *fields_of(made)]


def test_every_integer_may_be_written_with_a_point():
    """Every integer field has the type Whole, also within lists."""
    for made in fields_of():
        for name, field in made.model_fields.items() if made.__module__.startswith("lockstep") else ():
            asked = f"{field.annotation} {field.metadata}"
            assert not re.search(r"\bint\b", asked) or "BeforeValidator(func=<function integral" in asked, (made, name)
    assert read(CompletionFields, n=2.0, top_k=3.0, min_tokens=1.0, logprobs=1.0, stop_token_ids=[5.0]).n == 2
    assert refusal(CompletionFields, n=2.5).message == "n: expected an integer, got 2.5"
    assert refusal(ChatFields, top_k=True).message == "top_k: expected an integer, got true"


@by_generating_route
def test_empty_stop_strings_are_none(route):
    assert [params(route, stop=stop).stop for stop in ("", [""], [], None, ["", "x", ""])] == [()] * 4 + [("x",)]


@by_generating_route
@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(stop=["x"] * 17), "stop: expected at most 16 strings, got 17"),
        (dict(stop="x" * 257), "stop: expected at most 256 characters, got 257"),
        (dict(stop_token_ids=[1] * 17), "stop_token_ids: expected at most 16, got 17"),
        (dict(suppress_tokens=[1] * 1025), "suppress_tokens: expected at most 1024, got 1025"),
        (dict(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias: expected at most 1024 tokens, got 1025"),
        (dict(logit_bias={"x": 1}), "logit_bias: expected token ids as keys, got 'x'"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_wrong_in_a_field_has_its_name_and_a_code(route, fields, message):
    with pytest.raises(ApiError) as caught:
        params(route, **fields)
    error = caught.value
    assert (error.status, error.message, error.code) == (400, message, "invalid_value")
    assert error.param == next(iter(fields))


@by_generating_route
def test_a_temperature_that_is_hardly_any_is_the_least(route):
    found = [params(route, temperature=t).temperature for t in (0, 1e-300, 1e-5, 1e-3, 0.5, None)]
    assert found == [0, 1e-3, 1e-3, 1e-3, 0.5, 1]


@by_generating_route
def test_repeat_penalty_is_repetition_penalty(route):
    penalties = [
        dict(repeat_penalty=1.5),
        dict(repetition_penalty=1.5),
        dict(repeat_penalty=1.5, repeat_last_n=-1),
        dict(repeat_penalty=1.5, repetition_penalty=1.5, penalize_nl=True),
    ]
    assert {params(route, **fields).repetition_penalty for fields in penalties} == {1.5}
    assert params(route, repeat_penalty=1.0, repeat_last_n=64, penalize_nl=False).repetition_penalty == 1
    made = sampling_params(read(route, repeat_penalty=1.0), Limits(), 10, dict(repetition_penalty=1.2))
    assert made.repetition_penalty == 1  # the request's value overrides the model's default
    for fields, param in (
        (dict(repeat_penalty=1.5, repetition_penalty=1.0), "repeat_penalty"),
        (dict(repeat_penalty=1.5, repeat_last_n=64), "repeat_last_n"),
        (dict(presence_penalty=1.0, repeat_last_n=0), "repeat_last_n"),
        (dict(repeat_penalty=1.5, penalize_nl=False), "penalize_nl"),
        (dict(best_of=4), "best_of"),
    ):
        with pytest.raises(ApiError) as caught:
            params(route, **fields)
        assert caught.value.param == param
    assert params(route, best_of=1).n == 1


@pytest.mark.parametrize("route", [CompletionFields, ChatFields], ids=PATHS.get)
def test_stream_options_need_a_stream(route):
    for stream in (False, None):
        assert refusal(route, stream=stream, stream_options={}).param == "stream_options"
    assert read(route, stream=True, stream_options=dict(include_usage=True, include_obfuscation=False)).streams_usage
    assert not read(route, stream=True, stream_options=None).streams_usage and not read(route).streams_usage


# ---------------------------------------------------------------- fields of other servers

ASKING = {  # values that ask for something, and values that do not
    "grammar": ('root ::= "x"', [""]), "typical_p": (0.5, [1, 1.0]), "mirostat": (2, [0, 0.0]),
    "use_beam_search": (True, [False]), "tools": ([{}], [[]]), "documents": ([{"text": "x"}], [[]]),
    "chat_template": ("{{ x }}", [""]), "truncate_prompt_tokens": (5, []), "prompt_logprobs": (1, []),
    "echo": (True, [False]), "dry_multiplier": (0.8, [0]), "xtc_probability": (0.5, [0, -1]),
    "dynatemp_range": (0.5, [0]), "top_n_sigma": (1, [-1, 0]), "min_keep": (2, [0, 1]), "length_penalty": (2, [1.0]),
    "samplers": (["top_k"], [[]]), "n_probs": (5, [0]), "suffix": ("x", [""]), "n_predict": (5, [-1]),
    "adaptive_target": (0.5, [-1.0]), "modalities": (["text", "audio"], [["text"]]), "audio": ({"voice": "x"}, []),
    "response_format": ({"type": "json_object"}, [{"type": "text"}]), "logprobs": (True, [False]),
    "function_call": ({"name": "x"}, ["none", "auto"]), "t_max_predict_ms": (100, [0, -1]),
    "reasoning_format": ("none", ["auto"]), "add_special_tokens": (True, [False]), "tfs_z": (0.5, [1]),
}  # fmt: skip


@by_generating_route
def test_known_fields_are_refused_by_name_unless_they_ask_for_nothing(route):
    refused = {name: ASKING.get(name, ("surely not", ())) for name in GENERATION if name not in route.model_fields}
    assert len(refused) > 40
    for name, (asking, neutral) in refused.items():
        error = refusal(route, **{name: asking})
        assert (error.param, error.code) == (name, "unsupported"), name
        assert error.message.startswith(f"{name}: not supported, expected ") and "none" in error.message
        for value in [None, *neutral]:
            read(route, **{name: value})


def test_the_table_knows_what_asks_for_nothing():
    for name, (asking, neutral) in ASKING.items():
        assert not GENERATION[name].neutral(asking) and all(map(GENERATION[name].neutral, neutral)), name
    assert not GENERATION["mirostat"].neutral(False) and not GENERATION["use_beam_search"].neutral(0)
    assert not GENERATION["top_n_sigma"].neutral("x") and not GENERATION["typical_p"].neutral(True)


def test_known_fields_of_embeddings_and_within_objects():
    for name in EMBEDDING:
        assert refusal(EmbeddingFields, **{name: "surely not"}).param == name
    read(EmbeddingFields, embd_normalize=2, embed_dtype="float32", endianness="little", use_activation=True, seed=5)
    assert (
        refusal(CompletionFields, structured_outputs=dict(regex="a", whitespace_pattern=" ")).param
        == "structured_outputs.whitespace_pattern"
    )


@by_route
def test_fields_that_nobody_knows_or_that_change_no_answer_are_ignored(route):
    harmless = dict(
        user="me",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="k",
        verbosity="low",
        priority=3,
        request_id="r",
        cache_prompt=True,
        n_keep=5,
        n_discard=0,
        id_slot=-1,
        timings_per_token=True,
        return_progress=True,
        guided_decoding_backend="x",
        spaces_between_special_tokens=False,
        mirostat_tau=5.0,
        mirostat_eta=0.1,
        dry_base=1.75,
        dry_allowed_length=2,
        dry_penalty_last_n=-1,
        dry_sequence_breakers=["\n"],
        xtc_threshold=0.1,
        dynatemp_exponent=1.0,
        adaptive_decay=0.9,
        frobnicate=[None],
    )
    assert read(route, **harmless).model_dump(exclude={"metadata"}) == read(route).model_dump(exclude={"metadata"})
    said = DOCS.read_text()
    assert all(f"`{name}`" in said for name in harmless if name != "frobnicate")


def test_the_documentation_lists_every_known_field():
    section = DOCS.read_text().partition("### Fields of other servers")[2].partition("\n## ")[0]
    said = set(re.findall(r"`([a-z_.]+)`", section))
    nested = {f"structured_outputs.{name}" for name in STRUCTURED}
    assert said >= {*GENERATION, *EMBEDDING, *nested}, {*GENERATION, *EMBEDDING, *nested} - said


def test_arguments_of_earlier_calls():
    assert arguments_of('{"a": "\\ud83d", "b": [1e999, 2], "\\ud83d\\ude42": NaN}') == {
        "a": "\ufffd",
        "b": [None, 2],
        "🙂": None,
    }
    assert [*map(arguments_of, ("[1]", '{"a": ', '{"a": 1'))] == [
        dict(incomplete_json=text) for text in ("[1]", '{"a": ', '{"a": 1')
    ]
