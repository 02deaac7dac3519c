"""Drafts by the model's MTP head: no answer changes, and the head gets the hidden states that it needs."""

import dataclasses

import numpy as np
import pytest

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.engine.speculation.drafts import MAX_DRAFTS, Drafts
from lockstep.engine.speculation.mtp import HeadState, MtpDrafts
from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.mtp import FEW_TOKENS, guessed_tokens
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from lockstep.ops.linear.linear import Linear
from lockstep.weights.hub import resolve_model
from lockstep.weights.store import WeightStore
from tests.engine.speculation.test_drafts import LONG, PARAMS, PROMPTS, answer, pages, preemptions, run, same_pages
from tests.models import tiny
from tests.models.cases import hybrid
from tests.weights.gguf.gguf_models import qwen35_tensors, write_qwen35

CONFIG = hybrid(max_position_embeddings=4096, mtp_num_hidden_layers=1)


def loaded(folder, config=CONFIG, change=lambda arrays: None):
    arrays = tiny.tensors(config, 11)
    change(arrays)
    checkpoint = open_checkpoint(tiny.write(folder, config, arrays))
    return load_model(checkpoint, WeightStore(), "f32", "bf16", 2304)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def bundled():
    return load_model(open_checkpoint(resolve_model(None)), WeightStore())


@pytest.fixture
def engine(model):
    """Makes engines, and ends their threads."""
    made = []

    def make(of=model, **options):
        made.append(Engine(of, EngineOptions(**{"threads": 1, "max_requests": 3, "speculate": "mtp", **options})))
        return made[-1]

    make.made = made
    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def alone(model):
    """(answers, cached pages) of an engine without drafts that runs one request and one token at a time."""
    made = Engine(model, EngineOptions(max_step_tokens=1, max_requests=1, threads=1, kv_tokens=64 * 40))
    requests = run(made)
    yield [answer(r) for r in requests], pages(made, requests)
    made.close()


def head(engine) -> MtpDrafts:
    assert engine.drafter is not None and isinstance(engine.drafter.head, MtpDrafts)
    return engine.drafter.head


@pytest.mark.parametrize(
    "options", [dict(draft=1), dict(draft=3, threads=2), dict(draft=MAX_DRAFTS), dict(), dict(speculate="auto")]
)
def test_no_answer_and_no_cached_byte_changes(engine, alone, options):
    made = engine(kv_tokens=64 * 40, **options)
    requests = run(made)
    assert [answer(r) for r in requests] == alone[0]
    assert same_pages(pages(made, requests), alone[1])
    assert sum(r.num_drafted for r in requests) > (20 if "draft" in options else 0)
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages


@pytest.mark.parametrize("options", [dict(max_step_tokens=5), dict(kv_tokens=320, max_requests=6, max_step_tokens=50)])
def test_small_steps_and_crowds_change_nothing(engine, options):
    moved, _evicted, found = preemptions(engine(draft=4, **options))
    assert found == preemptions(engine(speculate="off", **options))[2]
    assert bool(moved) == ("kv_tokens" in options)


def test_all_drafts_of_a_step_are_one_native_call(engine, monkeypatch):
    made, calls = engine(draft=5), []
    native = made.team.run
    monkeypatch.setattr(made.team, "run", lambda *args: (calls.append(args[1]), native(*args))[1])
    requests = [made.add(p, s) for p, s in zip(PROMPTS[:3], LONG[:3], strict=True)]
    while any(r.num_drafted == 0 for r in requests):
        made.step()
    calls.clear()
    made.step()
    assert len(calls) == 2  # the drafts of three requests, and the step


def acceptance(engine, prompts, **params):
    """[right, drafted] by depth: drafts from every position of the engine's own answers, which are made without
    drafts."""
    seen, draft = [], engine.drafter.draft

    def without(plan):
        seen.extend((request, request.num_tokens, list(made.tokens)) for request, made in draft(plan).items())
        return {}

    engine.drafter.draft = without
    for i, prompt in enumerate(prompts):
        engine.add(prompt, SamplingParams(max_tokens=48, seed=i, ignore_eos=True, **params))
    while engine.has_work:
        engine.step()
    found = np.zeros((MAX_DRAFTS, 2), int)
    for request, at, drafts in seen:
        known = request.token_ids(at, request.num_tokens)
        right = next((i for i, (a, b) in enumerate(zip(drafts, known, strict=False)) if a != b), len(drafts))
        for depth in range(min(right + 1, len(drafts), len(known))):
            found[depth] += depth < right, 1
    return found


def code_prompts(llm_encode, num):
    with open(dataclasses.__file__) as file:
        ids = llm_encode(file.read())
    return [ids[at : at + 192] for at in range(0, 500 * num, 500)]


def test_the_bundled_head_guesses_what_its_model_says(engine, bundled):
    from lockstep.llm import LLM

    llm = LLM(threads=1, max_context=256)
    prompts = code_prompts(llm.encode, 25)
    llm.engine.close()
    for params, least in ((dict(temperature=0.0), (0.8, 0.75)), (dict(temperature=0.8), (0.65, 0.6))):
        found = acceptance(engine(bundled, draft=2, max_requests=10), prompts, **params)
        assert found[0, 1] > 1000
        assert (found[:2, 0] / found[:2, 1] >= least).all(), found[:2]


def test_a_found_prefix_is_known_to_the_head_too(engine):
    made = engine(draft=2, state_every=64)
    prompt = PROMPTS[4]
    first = made.add(prompt, LONG[0])
    while made.has_work:
        made.step()
    second = made.add([*prompt[:128], 3, 4, 5], LONG[0])
    while second.num_drafted == 0:
        made.step()
    assert second.num_cached == 128 and first.num_cached == 0
    known = second.draft_state
    assert isinstance(known, HeadState) and known.first_page == 0
    other = made.add([*prompt[:128], 3, 4, 5], LONG[0], cache_salt="another")
    while other.num_drafted == 0:
        made.step()
    assert isinstance(other.draft_state, HeadState) and other.draft_state.first_page == 0 and other.num_cached == 0


def test_a_prefix_without_pairs_is_left_out(engine):
    made = engine(draft=2, state_every=64)
    first = made.add(PROMPTS[4], LONG[0])
    while made.has_work:
        made.step()
    head(made).names.clear()
    second = made.add([*PROMPTS[4][:128], 3, 4, 5], LONG[0])
    while second.num_drafted == 0:
        made.step()
    assert first.finish_reason and second.num_cached == 128
    assert isinstance(second.draft_state, HeadState) and second.draft_state.first_page == 128 // PAGE_TOKENS


def test_a_head_that_gives_no_numbers_drafts_nothing(engine, alone):
    made = engine(draft=3)
    told = head(made).observe
    head(made).observe = lambda request, start, hidden: told(request, start, np.full_like(hidden, np.nan))
    requests = run(made)
    assert [answer(r) for r in requests] == alone[0]
    assert sum(r.num_drafted for r in requests) == 0


def test_where_drafts_do_not_pay_the_head_is_told_little(engine):
    """A random head guesses nothing right: after a while it gets no hidden states."""
    made, told = engine(max_requests=8), []
    assert made.drafter is not None
    observe = made.drafter.observe
    made.drafter.observe = lambda request, start, hidden: (told.append(len(hidden)), observe(request, start, hidden))
    for p in PROMPTS:
        made.add(p, dataclasses.replace(LONG[0], temperature=1.0, max_tokens=400))
    steps = 0
    while made.has_work:
        made.step()
        steps += 1
    assert sum(told) < 0.6 * 400 * len(PROMPTS)


def drop(name):
    return lambda arrays: arrays.pop(name)


def cut(name):
    return lambda arrays: arrays.update({name: arrays[name][:-16]})


@pytest.mark.parametrize(
    "config, change, message",
    [
        (
            hybrid(),
            None,
            "speculate: mtp needs a checkpoint with an MTP head; this one has 0 MTP layers .* and no tensor",
        ),
        (CONFIG, drop("mtp.fc.weight"), "this one has 1 MTP layers in its config and no tensor mtp.fc.weight"),
        (CONFIG, drop("mtp.norm.weight"), "tensor 'mtp.norm.weight' of shape .* is missing"),
        (CONFIG, drop("mtp.layers.0.mlp.up_proj.weight"), "tensor 'mtp.layers.0.mlp.up_proj.weight' .* is missing"),
        (CONFIG, cut("mtp.fc.weight"), r"tensor 'mtp.fc.weight': expected shape \[.*\], found"),
        ({**CONFIG, "mtp_num_hidden_layers": 2}, None, "supported with one MTP layer, .* has 2"),
    ],
    ids=range(6),
)
def test_no_head_or_a_part_of_one_is_refused(tmp_path, config, change, message):
    made = loaded(tmp_path, config, change or (lambda arrays: None))
    with pytest.raises(ValueError, match=message):
        Engine(made, EngineOptions(threads=1, max_requests=1, speculate="mtp"))
    Engine(made, EngineOptions(threads=1, max_requests=1)).close()


def test_auto_does_without_a_head(tmp_path, engine):
    made = engine(loaded(tmp_path, hybrid()), speculate="auto", draft=2)
    assert made.drafter is not None and made.drafter.head is None
    assert sum(r.num_drafted for r in run(made, PARAMS)) > 0


def test_a_prediction_is_followed_although_the_head_was_better_before(engine):
    made = engine(draft=3, speculate="auto", prefix_cache=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    first = made.add(PROMPTS[1], params)
    while made.has_work:
        made.step()
    for _ in range(50):  # others' predictions were wrong, and the head was right
        made.drafter.note(first, Drafts([3] * 3, ["mtp"] * 3, ["mtp"] * 3), 3)
        made.drafter.note(first, Drafts([3] * 3, ["prediction"] * 3, ["prediction 3"] * 3), 0)
    before = made.drafter.counts["mtp"].drafted[0], made.drafter.counts["prediction"].right[0]
    second = made.add(PROMPTS[1], params, prediction=first.output_ids)
    while made.has_work:
        made.step()
    assert answer(second) == answer(first)
    assert 0 < made.drafter.counts["mtp"].drafted[0] - before[0] < 15  # the head begins, as it was better
    assert made.drafter.counts["prediction"].right[0] - before[1] > 8


def test_of_a_large_vocabulary_the_first_tokens_are_guessed():
    assert [guessed_tokens(n) for n in (4096, 2 * FEW_TOKENS, 151936)] == [4096, 2 * FEW_TOKENS, FEW_TOKENS]


@pytest.mark.parametrize("weights, expected", [("f32", "q8_0"), ("bf16", "q8_0"), ("auto", "q8_0"), ("q4_0", "q4_0")])
def test_a_head_is_multiplied_in_eight_bits_or_fewer(bundled, monkeypatch, weights, expected):
    monkeypatch.setattr("lockstep.models.mtp.FEW_TOKENS", 1024)
    made = load_model(bundled.checkpoint, WeightStore(), weights)
    used = [op.weight for op in made.recorded_mtp.ops if isinstance(op, Linear)]
    assert {weight.format for weight in used} == {expected}
    logits = used[-1]
    assert logits.shape == (1024, 256)
    assert (logits.whole is not None) == (weights == expected)  # the model's own rows, or rows of their own
    if logits.whole is None:
        assert [part.shape for part in logits.parts] == [(1024, 256)] and len(logits.parts[0].data) == 1024


def test_a_head_over_the_first_tokens_drafts_them(tmp_path, monkeypatch, alone):
    monkeypatch.setattr("lockstep.models.mtp.FEW_TOKENS", 32)
    made = Engine(loaded(tmp_path), EngineOptions(threads=1, max_requests=3, speculate="mtp", draft=3))
    drafted, stepped = [], made.runner.step

    def step(spans, clock=None):
        drafted.extend(t for s in spans if s.num_drafts for t in s.token_ids[-s.num_drafts :])
        return stepped(spans, clock)

    made.runner.step = step
    assert [answer(r) for r in run(made)] == alone[0]
    made.close()
    assert drafted and max(drafted) < 32


def test_a_head_of_a_gguf_file_drafts(tmp_path, engine):
    tensors = qwen35_tensors(np.random.default_rng(11), 2, 4)
    path = write_qwen35(tmp_path / "m.gguf", tensors, 2, 4)
    made = load_model(open_checkpoint(path), WeightStore(), "f32", "bf16", 512)
    answers = []
    for options in (dict(speculate="off"), dict(draft=3)):
        answers.append(engine(made, **options).add([3, 4, 5] * 20, SamplingParams(max_tokens=40, ignore_eos=True)))
    for one in engine.made:
        while one.has_work:
            one.step()
    assert answers[0].output_ids == answers[1].output_ids and answers[1].num_drafted > 30


def test_a_slow_guess_that_was_bad_luck_is_forgotten(engine):
    """A time that was so long by chance that the head would never guess again."""
    made = engine(draft=None)
    head(made).costs.note(1, 0.02)
    request = made.add(PROMPTS[1], dataclasses.replace(LONG[0], max_tokens=900))
    while made.has_work and not request.num_drafted:
        made.step()
    assert request.num_drafted
    made.cancel(request)
