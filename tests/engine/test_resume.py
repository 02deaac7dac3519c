"""Answers that go on in an engine: streams bring what is new only, samples go on each from its own tokens, cached
prefixes count for the prompt, and numbers that are not finite are found among known tokens, too.

That all bits are the same is shown by tests/promise/test_resume.py.
"""

import asyncio

import numpy as np
import pytest

from lockstep.engine.async_engine import AsyncEngine
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.engine.token_stream import batches, until_the_end
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.store import WeightStore
from tests.models import tiny
from tests.models.cases import case
from tests.promise.models import Case, load

PROMPT = np.random.RandomState(5).randint(3, 96, 100).tolist()
PARAMS = SamplingParams(max_tokens=60, temperature=0.9, seed=7, ignore_eos=True, logprobs=2)


class Letters:
    """A Detokenizer that shows each token as a letter."""

    def __init__(self, request):
        pass

    def push(self, token):
        return chr(192 + token)

    def finish(self):
        return ""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(Case("qwen3_5", "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(model):
    made = Engine(model, EngineOptions(threads=1, max_requests=4, max_step_tokens=64), new_detokenizer=Letters)
    yield made
    made.close()


def run(engine, params=PARAMS, **options):
    """The requests of a prompt's samples at their end, and how many steps they took."""
    requests, num_steps = engine.add_samples(PROMPT, params, **options), 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    return requests, num_steps


def told(request):
    return request.output_ids, request.logprobs, request.top_logprobs, request.text, request.finish_reason


@pytest.fixture(scope="module")
def whole(engine):
    return run(engine)[0][0]


def test_samples_go_on_each_from_its_own_tokens(engine):
    params = SamplingParams(max_tokens=9, temperature=1, seed=3, ignore_eos=True, n=4, prompt_logprobs=0)
    uninterrupted, _ = run(engine, params)
    given = [uninterrupted[0].output_ids, [], *(r.output_ids[: 2 * i] for i, r in enumerate(uninterrupted[2:], 1))]
    again, _ = run(engine, params, output_ids=given)
    assert list(map(told, again)) == list(map(told, uninterrupted))
    assert [r.prompt_logprobs for r in again] == [r.prompt_logprobs for r in uninterrupted]
    assert [r.num_given for r in again] == [9, 0, 2, 4]


def test_known_tokens_take_as_few_steps_as_a_prompt_where_no_row_is_reported(engine, whole):
    given = whole.output_ids[:50]
    [reported], num_steps = run(engine, cache_salt="a", output_ids=given)
    [silent], num_fewer = run(engine, cache_salt="b", output_ids=given, recompute_logprobs=False)
    # 150 tokens in steps of up to 64: a step ends at the last whole block of the prompt, since states are kept there
    assert num_fewer == 3 + 9 and num_steps == num_fewer
    assert told(reported) == told(whole) and silent.output_ids == whole.output_ids
    assert silent.logprobs[50:] == whole.logprobs[50:] and np.isnan(silent.logprobs[:50]).all()
    assert (reported.num_cached, silent.num_cached) == (0, 0)


def test_blocks_of_a_known_answer_come_from_the_cache_but_count_for_the_prompt_only(engine, whole):
    [again], num_steps = run(engine, output_ids=whole.output_ids[:40], recompute_logprobs=False)
    assert num_steps < 25 and again.output_ids == whole.output_ids
    assert 0 < again.num_cached <= len(PROMPT)


def test_an_answer_that_is_given_whole_ends_at_once_or_when_its_logprobs_are_there(engine, whole):
    [ended], num_steps = run(engine, output_ids=whole.output_ids, recompute_logprobs=False)
    assert num_steps == 0 and ended.finish_reason == "length" and ended.text == whole.text
    before = engine.counts()["generated_tokens"]
    [again], _ = run(engine, output_ids=whole.output_ids)
    assert told(again) == told(whole) and engine.counts()["generated_tokens"] == before
    assert engine.scheduler.pages.num_free == engine.scheduler.pages.num_pages


def test_an_embedding_has_no_answer_to_go_on_from(engine):
    with pytest.raises(ValueError, match="output_ids: expected none with pooling"):
        engine.make(PROMPT, SamplingParams(pooling="last"), output_ids=[1])
    with pytest.raises(ValueError, match="output_ids: token ids must be 0 to 95, got 4 to 96"):
        engine.make(PROMPT, PARAMS, output_ids=[4, 96])


# ---------------------------------------------------------------- streams


@pytest.fixture
def running(model):
    options = EngineOptions(threads=1, max_requests=4, max_step_tokens=64)
    made = AsyncEngine(Engine(model, options, new_detokenizer=Letters))
    yield made
    made.close()


async def read(streams):
    """[(number of the stream, ids of its tokens, their text, its finish_reason), ...]"""
    return [
        (number, [token.id for token in tokens], "".join(token.text for token in tokens), reason)
        async for found in batches(streams, until_the_end)
        for number, tokens, reason in found
    ]


def test_a_stream_brings_what_is_new_only(running, whole):
    stream = running.submit(PROMPT, PARAMS, output_ids=whole.output_ids[:50])
    tokens = list(stream)
    assert [(t.index, t.id, t.logprob, t.top_logprobs) for t in tokens] == [
        (i, whole.output_ids[i], whole.logprobs[i], whole.top_logprobs[i]) for i in range(50, 60)
    ]
    assert "".join(t.text for t in tokens) == whole.text[50:] and stream.request.text == whole.text


@pytest.mark.parametrize("recompute", [True, False])
def test_a_stream_that_has_nothing_new_still_tells_how_it_ended(running, whole, recompute):
    options = dict(output_ids=[whole.output_ids, [*whole.output_ids[:59]]], recompute_logprobs=recompute)
    streams = running.submit_all([(PROMPT, PARAMS), (PROMPT, PARAMS)], **options)
    found = sorted(asyncio.run(read(streams)))
    assert found == [(0, [], "", "length"), (1, whole.output_ids[59:], whole.text[59:], "length")]
    assert list(running.submit(PROMPT, PARAMS, output_ids=whole.output_ids)) == []


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("num_given", [1, 3])
def test_known_tokens_whose_logits_are_not_finite_fail_the_request(tmp_path, num_given):
    config = case("llama")
    arrays = tiny.tensors(config, 11)
    arrays["model.norm.weight"][:] = 3e38
    model = load_model(open_checkpoint(tiny.write(tmp_path, config, arrays)), WeightStore(), "f32", "f32", 256)
    engine = Engine(model, EngineOptions(threads=1))
    try:
        [request], _ = run(engine, SamplingParams(max_tokens=3), output_ids=[7, 8, 9][:num_given])
        assert request.error == "the model's logits are not finite" and request.is_fault
        assert len(request.output_ids) == num_given
    finally:
        engine.close()
