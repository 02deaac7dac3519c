"""Embeddings on a tiny model: the same bits alone, beside other requests, in chunks, after cached prefixes and
preemptions."""

import numpy as np
import pytest

from lockstep.engine.embedding import Pool
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import SamplingParams
from lockstep.runtime.step_block import StepBlock
from tests.ops.harness import same_bits
from tests.promise.models import Case, load

LENGTHS = (1, 70, 3, 64, 129, 200)
PROMPTS = [np.random.RandomState(i).randint(3, 96, n).tolist() for i, n in enumerate(LENGTHS)]
POOLINGS = ("last", "mean")
CASES = [Case("qwen3_5", "f32", "bf16"), Case("qwen3", "q8_0", "bf16")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request, tmp_path_factory):
    return load(request.param, tmp_path_factory.mktemp("tiny"))


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


@pytest.fixture(scope="module")
def alone(model):
    """{pooling: vectors} of an engine that runs one request and one token at a time."""
    made = Engine(model, EngineOptions(max_step_tokens=1, max_requests=1, threads=1, prefix_cache=False))
    yield {pooling: embedded(made, pooling) for pooling in POOLINGS}
    made.close()


def finish(engine):
    while engine.has_work:
        engine.step()


def vectors(requests):
    assert all((r.finish_reason, r.output_ids, r.slot) == ("embedded", [], None) for r in requests)
    return np.stack([r.pool.embedding(normalize=False) for r in requests])


def embedded(engine, pooling, prompts=PROMPTS):
    requests = [engine.add(p, SamplingParams(pooling=pooling)) for p in prompts]
    finish(engine)
    return vectors(requests)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "options",
    [
        dict(max_step_tokens=512, max_requests=8),
        dict(max_step_tokens=7, threads=3),
        dict(kv_tokens=256, max_step_tokens=40),
    ],
    ids=str,
)
def test_company_chunks_and_threads_do_not_matter(engine, alone, pooling, options):
    made = engine(**options)
    mates = [made.add(p[::-1], SamplingParams(max_tokens=9, ignore_eos=True)) for p in PROMPTS[1:4]]
    same_bits(embedded(made, pooling), alone[pooling])
    assert [m.finish_reason for m in mates] == ["length"] * 3
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_cached_prefix_does_not_matter(engine, alone, pooling):
    made = engine()
    same_bits(embedded(made, pooling), alone[pooling])
    hits = made.scheduler.prefix.counts
    before = hits.hit_tokens
    same_bits(embedded(made, pooling), alone[pooling])
    # whole blocks before the last token: (64 of 70), 128 of 129, 192 of 200; the mean wants every row
    found = 64 * (made.model.config.layers[0].kind == "attention") + 128 + 192
    assert hits.hit_tokens - before == (found if pooling == "last" else 0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_preemption_does_not_matter(engine, alone, pooling):
    made = engine(max_step_tokens=30)
    requests = [made.add(p, SamplingParams(pooling=pooling)) for p in PROMPTS]
    for _ in range(12):
        made.step()
        if made.scheduler.running:
            made.scheduler.preempt(made.scheduler.running[-1])
    finish(made)
    same_bits(vectors(requests), alone[pooling])
    assert sum(r.num_preemptions for r in requests) > 6


def test_prompts_that_answer_are_not_disturbed(engine):
    made, params = engine(max_requests=8), SamplingParams(max_tokens=12, temperature=0.8, seed=4, ignore_eos=True)
    calm = made.add(PROMPTS[1], params)
    finish(made)
    mates = [made.add(p, SamplingParams(pooling=k)) for p in PROMPTS for k in POOLINGS]
    again = made.add(PROMPTS[1], params)
    finish(made)
    assert (again.output_ids, again.logprobs) == (calm.output_ids, calm.logprobs)
    assert all(m.finish_reason == "embedded" for m in mates)


def test_the_head_does_not_run_for_them(engine):
    made = engine()
    sampled = []
    run = made.runner.executor.run
    made.runner.executor.run = lambda step, clock=None: (
        sampled.append(int(step[StepBlock.index("num_sampled")])),
        run(step, clock),
    )
    embedded(made, "mean")
    assert sampled and not any(sampled)


def test_the_hidden_state_is_what_the_head_reads(engine, model, alone):
    """The logits of the last token are the float64 product of its hidden state and the head's weights."""
    head = model.checkpoint.tensors["lm_head.weight"].to_f32().astype(np.float64)
    made = engine()
    requests = [made.add(p, SamplingParams(max_tokens=1, logprobs=20, ignore_eos=True)) for p in PROMPTS]
    finish(made)
    worst = 2e-5 if model.weights == "f32" else 0.06  # q8_0 rounds the head's weights and the hidden state
    for request, hidden in zip(requests, alone["last"].astype(np.float64), strict=True):
        logits = head @ hidden
        expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        for token, logprob in request.top_logprobs[0].items():
            assert abs(expected[token] - logprob) < worst


def test_a_prompt_may_fill_the_context(engine):
    made = engine()
    r = made.add([5] * 2304, SamplingParams(pooling="last"))
    finish(made)
    assert r.finish_reason == "embedded"
    with pytest.raises(ValueError, match="more than the context of 2304"):
        made.add([5] * 2305, SamplingParams(pooling="last"))


def test_length_one_unless_told_otherwise():
    rows = np.random.RandomState(0).standard_normal((5, 48)).astype(np.float32)
    mean, last = Pool("mean", 5), Pool("last", 5)
    for start, end in ((0, 2), (2, 4), (4, 5)):
        for pool in (mean, last):
            wanted = pool.rows(start, end)
            pool.take(rows[start:end][wanted.start : wanted.stop])
    exact = rows.astype(np.float64).mean(0)
    assert np.abs(mean.embedding(normalize=False) - exact).max() < 1e-7
    same_bits(last.embedding(normalize=False), rows[4])
    for pool, whole in ((mean, exact), (last, rows[4].astype(np.float64))):
        assert np.abs(pool.embedding() - whole / np.linalg.norm(whole)).max() < 1e-7
        assert abs(np.linalg.norm(pool.embedding().astype(np.float64)) - 1) < 1e-6


@pytest.mark.parametrize(
    "bad",
    [
        dict(pooling="max"),
        dict(pooling="last", n=2),
        dict(pooling=1),
        dict(max_tokens=0),
        dict(pooling="mean", prompt_logprobs=0),
    ],
)
def test_a_bad_request_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)
