"""A model whose logits overflow after some prompts: these requests fail with a clear error, and no other request is
disturbed."""

import numpy as np
import pytest

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.weights.store import WeightStore
from tests.models import tiny
from tests.models.cases import case, hybrid

SAID = "the model's logits are not finite"
PROMPTS = [np.random.RandomState(i).randint(3, 96, 70).tolist() for i in range(12)]
WISHES = [
    SamplingParams(max_tokens=2, **wish)
    for wish in (
        dict(),
        dict(temperature=0.8, top_p=0.9, logprobs=5),
        dict(temperature=1, top_k=3, repetition_penalty=1.3),
        dict(prompt_logprobs=2),
        dict(logit_bias={5: -100}, min_tokens=2),
    )
]


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def model(request, tmp_path_factory):
    """All weights are finite; one logit overflows where one number of the last hidden state is above 1.1 or below
    -1.1."""
    config = hybrid() if request.param == "qwen3_5" else case("llama")
    arrays = tiny.tensors(config, 11)
    arrays["lm_head.weight"][5] = 0
    arrays["lm_head.weight"][5, 3] = 3e38
    path = tiny.write(tmp_path_factory.mktemp("tiny"), config, arrays)
    return load_model(open_checkpoint(path), WeightStore(), "f32", "f32", 256)


def run(engine, prompts, params):
    """The requests at their end; the steps must have returned each of them as ended once."""
    made, ended = [engine.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)], []
    while engine.has_work:
        ended += [request for request in engine.step() if request.finish_reason is not None]
    assert sorted(r.id for r in ended) == [r.id for r in made]
    return made


def told(r):
    return r.finish_reason, r.error, r.output_ids, r.logprobs, repr(r.prompt_logprobs)  # repr: NaN != NaN


def test_requests_fail_by_name_and_their_neighbours_give_the_same_bits(model, tmp_path):
    engine = Engine(model, EngineOptions(threads=1, max_requests=5, cache_dir=tmp_path))
    try:
        params = [WISHES[i % len(WISHES)] for i in range(len(PROMPTS))]
        alone = [told(run(engine, [prompt], [p])[0]) for prompt, p in zip(PROMPTS, params, strict=True)]
        together = run(engine, PROMPTS, params)
        assert [told(r) for r in together] == alone
        failed = [r for r in together if r.finish_reason == "error"]
        assert 0 < len(failed) < len(PROMPTS) and all(r.is_fault and r.error == SAID for r in failed)
        assert all(np.isfinite(r.logprobs).all() for r in together) and engine.counts()["not_finite"] == 2 * len(failed)
        engine.scheduler.prefix.disk.flush()
        for request in together:
            known = [
                engine.scheduler.pages.allocators[0].find(name) is not None
                or engine.scheduler.prefix.disk.has("page", name)
                for name in request.prefix.block_names[: 70 // PAGE_TOKENS]
            ]
            assert known == [request.finish_reason != "error"]
        counts = engine.counts()
        assert counts["pages_free"] + counts["pages_idle"] == counts["pages"]
    finally:
        engine.close()


def test_hidden_states_that_are_not_finite_fail_as_logits_do(tmp_path):
    config = case("llama")
    arrays = tiny.tensors(config, 11)
    arrays["model.norm.weight"][:] = 3e38
    model = load_model(open_checkpoint(tiny.write(tmp_path, config, arrays)), WeightStore(), "f32", "f32", 256)
    engine = Engine(model, EngineOptions(threads=1, max_requests=4, max_step_tokens=20))
    try:
        wishes = [SamplingParams(pooling="mean"), SamplingParams(pooling="last"), SamplingParams()]
        found = run(engine, PROMPTS[:3], wishes)
        assert [r.error for r in found] == ["the model's hidden states are not finite"] * 2 + [SAID]
    finally:
        engine.close()


# the overflowing numbers: all queries, keys and values of a layer, or one of the three, in the first or the last layer
OVERFLOWS = [
    ("layers.0.input_layernorm", "f32"),
    ("layers.1.input_layernorm", "q8_0"),
    ("layers.0.self_attn.v_proj", "f32"),
    ("layers.1.self_attn.k_proj", "f32"),
    ("layers.1.self_attn.q_proj", "f32"),
]


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "q8"])
@pytest.mark.parametrize(("name", "weights"), OVERFLOWS)
def test_no_type_of_cache_hides_what_overflows(name, weights, kv_dtype, tmp_path):
    config = case("llama")
    arrays = tiny.tensors(config, 11)
    large = arrays[f"model.{name}.weight"]
    large[:] = np.sign(large) * np.float32(3e38)
    model = load_model(open_checkpoint(tiny.write(tmp_path, config, arrays)), WeightStore(), weights, kv_dtype, 256)
    engine = Engine(model, EngineOptions(threads=1, max_requests=1, max_step_tokens=32))
    try:
        assert run(engine, PROMPTS[:1], WISHES[:1])[0].error == SAID
    finally:
        engine.close()
