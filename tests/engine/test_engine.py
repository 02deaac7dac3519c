"""The engine on a tiny model: which requests it refuses, how requests end, and that none of this changes the tokens of
other requests."""

import numpy as np
import pytest

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from tests.promise.models import Case, load

PROMPTS = [np.random.RandomState(i).randint(3, 96, n).tolist() for i, n in enumerate((1, 70, 3, 33, 129, 16, 2, 64))]
PARAMS = [
    SamplingParams(max_tokens=5 + 7 * i, temperature=(0, 0.9)[i % 2], top_p=0.95, seed=i, ignore_eos=True)
    for i in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(Case("qwen3_5", "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model):
    """Makes engines, and ends their threads."""
    made = []

    def make(**options):
        options = {"threads": 1, "max_requests": 3, "prompt_state_from": 0, **options}
        made.append(Engine(model, EngineOptions(**options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def finish(engine):
    while engine.has_work:
        engine.step()


def answers(engine):
    """[(tokens, logprobs, finish_reason)] of all prompts, run together."""
    requests = [engine.add(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
    finish(engine)
    return [(r.output_ids, r.logprobs, r.finish_reason) for r in requests]


@pytest.fixture(scope="module")
def alone(model):
    """The answers of an engine that runs one request and one token at a time."""
    made = Engine(model, EngineOptions(max_step_tokens=1, max_requests=1, threads=1))
    yield answers(made)
    made.close()


@pytest.mark.parametrize(
    "options",
    [
        dict(max_step_tokens=512),
        dict(max_step_tokens=7),
        dict(max_step_tokens=64, max_requests=8),
        dict(max_step_tokens=3, max_requests=1, threads=3),
        dict(kv_tokens=192),
    ],
    ids=str,
)
def test_more_requests_than_places_all_finish_with_their_own_tokens(engine, alone, options):
    made = engine(**options)
    assert answers(made) == alone
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages


def test_cancelled_requests_free_their_pages_at_once_and_disturb_nobody(engine, alone):
    made = engine(max_step_tokens=40)
    requests = [made.add(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
    made.step()
    running, waiting = made.scheduler.running[1], made.scheduler.waiting[-1]
    free = made.scheduler.pages.num_free
    held = sum(len(each.ids) for each in running.pages)
    made.cancel(running)
    made.cancel(waiting)
    assert made.scheduler.pages.num_free == free + held and running.pages == [] and held > 0
    made.cancel(running)
    finish(made)
    for r, expected in zip(requests, alone, strict=True):
        if r in (running, waiting):
            assert r.finish_reason == "cancelled"
        else:
            assert (r.output_ids, r.logprobs, r.finish_reason) == expected


@pytest.mark.parametrize(
    "prompt, max_tokens, message",
    [
        ([], 5, "at least one token"),
        ([1, 96], 5, "0 to 95, got 1 to 96"),
        ([-1], 5, "0 to 95, got -1"),
        ([1] * 2300, 5, "more than the context of 2304"),
        ([1], 2304, "more than the context of 2304"),
    ],
)
def test_a_bad_prompt_is_refused_and_nothing_is_left_of_it(engine, prompt, max_tokens, message):
    made = engine()
    with pytest.raises(ValueError, match=message):
        made.add(prompt, SamplingParams(max_tokens=max_tokens))
    assert not made.has_work


def test_a_prompt_may_fill_the_context_exactly(engine):
    made = engine()
    r = made.add([5] * 2303, SamplingParams(max_tokens=1))
    finish(made)
    assert (len(r.output_ids), r.finish_reason) == (1, "length")


def test_end_tokens_end_a_request_unless_ignored(engine, alone):
    tokens = alone[0][0]
    made = engine()
    made.eos_ids = frozenset({tokens[2]})
    stop = tokens.index(tokens[2]) + 1
    ends = made.add(PROMPTS[0], SamplingParams(max_tokens=5))
    ignores = made.add(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True))
    stops = made.add(PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True, stop_token_ids=(tokens[2],)))
    finish(made)
    assert (ends.output_ids, ends.finish_reason) == (tokens[:stop], "stop")
    assert (stops.output_ids, stops.finish_reason) == (tokens[:stop], "stop")
    assert (ignores.output_ids, ignores.finish_reason) == (tokens, "length")


def test_alternatives_are_those_of_the_logits(engine):
    made = engine()
    r = made.add(PROMPTS[1], SamplingParams(max_tokens=3, logprobs=4, ignore_eos=True))
    finish(made)
    for token, logprob, top in zip(r.output_ids, r.logprobs, r.top_logprobs, strict=True):
        assert len(top) == 4 and next(iter(top)) == token and abs(top[token] - logprob) < 1e-5
        assert list(top.values()) == sorted(top.values(), reverse=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_step_tokens": 0},
        {"max_requests": 0},
        {"kv_tokens": 63},
        {"threads": 0},
        {"max_requests": 1.5},
        {"state_every": 100},
        {"state_bytes": -1},
        {"max_requests": None},
        {"max_step_tokens": True},
        {"kv_tokens": 10**30},
        {"prefix_cache": "yes"},
        {"cache_dir": 5},
        {"cache_dir": ""},
    ],
)
def test_a_bad_option_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngineOptions(**bad)


def test_more_cache_than_the_machine_has_memory_is_refused_with_what_would_fit(engine):
    expected = rf"kv_tokens: {10**12} tokens take .* GiB; this machine has .*, enough for \d+"
    with pytest.raises(ValueError, match=expected):
        engine(kv_tokens=10**12)


def test_more_memory_than_there_is_is_refused(engine):
    with pytest.raises(ValueError, match="kv_tokens: not enough memory"):
        engine(max_step_tokens=(1 << 31) - 1)


@pytest.mark.parametrize("bad", [0, -5, 2.5, "64", True])
def test_a_bad_context_is_named(bad):
    with pytest.raises(ValueError, match="max_context: expected a positive integer"):
        load_model(None, None, max_context=bad)


def test_log_probabilities_of_a_prompt_are_all_there_whatever_is_cached_or_preempted(engine):
    made = engine(max_step_tokens=50)
    params = SamplingParams(max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    first = made.add(PROMPTS[4], params)
    finish(made)
    again, hot = made.add(PROMPTS[4], params), made.add(PROMPTS[4], SamplingParams(max_tokens=3, ignore_eos=True))
    made.step()
    made.step()
    made.scheduler.preempt(again)
    finish(made)
    assert again.num_preemptions == 1 and len(again.prompt_logprobs) == 128
    assert (again.prompt_logprobs, again.prompt_top_logprobs) == (first.prompt_logprobs, first.prompt_top_logprobs)
    assert again.output_ids == first.output_ids == hot.output_ids
    assert made.scheduler.prefix.counts.hit_tokens == 128, "who asks for less takes what is cached"


def test_a_preempted_request_goes_on_where_it_was(engine, alone):
    made = engine(max_step_tokens=64)
    requests = [made.add(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
    for _ in range(40):
        made.step()
        if made.scheduler.running:
            made.scheduler.preempt(made.scheduler.running[0])
    finish(made)
    assert [(r.output_ids, r.logprobs, r.finish_reason) for r in requests] == alone
    assert sum(r.num_preemptions for r in requests) > 20


def test_penalties_count_the_same_tokens_after_a_preemption(engine):
    params = SamplingParams(
        max_tokens=30,
        temperature=0.9,
        seed=2,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=0.2,
        logit_bias={7: 3.0},
        ignore_eos=True,
    )
    made = engine()
    calm = made.add(PROMPTS[3], params)
    finish(made)
    disturbed = made.add(PROMPTS[3], params)
    for _ in range(9):
        for _ in range(3):
            made.step()
        made.scheduler.preempt(disturbed)
    finish(made)
    assert (disturbed.output_ids, disturbed.logprobs) == (calm.output_ids, calm.logprobs)
    assert disturbed.num_preemptions == 9


def test_counts_say_what_happened(engine):
    made = engine(max_requests=2)
    for _ in range(2):
        made.add(PROMPTS[4], SamplingParams(max_tokens=3, ignore_eos=True))
    made.step()
    found = made.counts()
    assert (found["running"], found["waiting"], found["pages_idle"], found["query_tokens"]) == (1, 1, 0, 129)
    finish(made)
    found = made.counts()
    assert (found["running"], found["waiting"], found["hit_tokens"]) == (0, 0, 128)
    assert (found["pages_idle"], found["pages_free"], found["generated_tokens"]) == (2, found["pages"] - 2, 6)
