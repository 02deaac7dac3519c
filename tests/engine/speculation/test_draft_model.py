"""Guesses of a draft model: the target's own choices where it is the same model; all its memory is given back."""

import dataclasses

import numpy as np
import pytest

from lockstep.engine.cache import size as cache_size
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import SamplingParams
from lockstep.engine.speculation import draft_model
from lockstep.engine.speculation.draft_model import DraftModel
from tests.models import tiny
from tests.models.cases import case, hybrid
from tests.models.running import load
from tests.promise.models import CONFIGS as promised
from tests.promise.models import Case
from tests.promise.models import load as load_case
from tests.speculation.masks import FewAfterEach

CONFIGS = ("qwen3", "qwen3_5")
PROMPTS = [[3 + (i * i + 5 * k) % 90 for i in range(n)] for k, n in enumerate((1, 70, 200, 64, 9))]
PARAMS = [
    SamplingParams(max_tokens=60, ignore_eos=True),
    SamplingParams(max_tokens=50, temperature=0.8, seed=1, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=40, temperature=0.8, seed=2, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(max_tokens=45, temperature=1.2, top_k=30, top_p=0.9, seed=3, min_tokens=40, logit_bias={5: 3.0}),
    SamplingParams(max_tokens=30, temperature=0.8, seed=4, presence_penalty=1.0, stop_token_ids=(7, 8, 9)),
]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    return load_case(Case(request.param, "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


def check_all_is_back(memory, limits):
    """All pages and slots are free, after the leftovers are dropped."""
    while memory.leftovers:
        memory.drop_oldest()
    assert memory.pages.num_free == memory.pages.num_pages >= limits.num_pages
    assert sorted(memory.free_slots) == list(range(limits.max_requests))


class Watched:
    """An engine without drafts, and a draft model that guesses before every `every`th step.

    most: guesses wanted of a request. guesses: [(request, tokens that its answer had, guesses)]. behind: {(request id,
    tokens that its answer had): whether the draft model was behind}.
    """

    def __init__(self, model, draft, most=5, every=1, **options):
        options = EngineOptions(**{"threads": 1, "max_requests": 5, **options})
        self.engine = Engine(model, options)
        drafting = dataclasses.replace(options, speculate="model", draft=most)
        groups = cache_size.page_groups(draft.recorded, self.engine.limits.num_pages, drafting)
        self.drafts = DraftModel(draft, model, self.engine.team, self.engine.limits, groups, self.engine.eos_ids)
        self.most, self.every, self.num_steps, self.guesses, self.behind = most, every, 0, [], {}

    def step(self):
        self.num_steps += 1
        if self.num_steps % self.every == 0:
            running = self.engine.scheduler.running
            left = [r.params.max_tokens - len(r.output_ids) - 1 for r in running]
            wanted = [(r, min(self.most, n) if r.num_left == 1 else 0) for r, n in zip(running, left, strict=True)]
            made = self.drafts.guess(wanted, len(wanted))
            assert list(made) == [r.id for r in running]
            self.guesses += [(r, len(r.output_ids), made[r.id]) for r in running]
            self.behind |= {(r.id, len(r.output_ids)): self.drafts.is_behind(r) for r in running}
        return self.engine.step()

    def run(self, prompts=PROMPTS, params=PARAMS):
        requests = [self.engine.add(p, s) for p, s in zip(prompts, params, strict=True)]
        while self.engine.has_work:
            self.step()
        return requests

    def close(self):
        for request in [f.request for f in self.drafts.sequences.values()]:
            self.drafts.forget(request)
        check_all_is_back(self.drafts.memory, self.engine.limits)
        self.engine.close()


@pytest.fixture
def watched():
    """Makes Watched, and closes them."""
    made = []

    def make(*args, **options):
        made.append(Watched(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wrong(guesses):
    """The guesses that differ from the answer, as far as the answer goes."""
    return [(r.id, at, g) for r, at, g in guesses if r.output_ids[at : at + len(g)] != g[: len(r.output_ids) - at]]


def test_a_model_guesses_its_own_answers_under_a_mask(model, watched):
    params = [dataclasses.replace(each, logits_mask=FewAfterEach(96)) for each in PARAMS]
    made = watched(model, model, most=7)
    requests = made.run(params=params)
    plain = watched(model, model, most=1, every=10**6).run(params=params)
    assert [r.output_ids for r in requests] == [r.output_ids for r in plain]
    assert not wrong(made.guesses) and sum(len(g) == 7 for _, _, g in made.guesses) > 50


@pytest.mark.parametrize("most", [1, 2, 7])
@pytest.mark.parametrize("every", [1, 3])
def test_a_model_guesses_its_own_answers_with_their_noise_and_wishes(model, watched, most, every):
    made = watched(model, model, most=most, every=every)
    requests = made.run()
    assert not wrong(made.guesses)
    full = [g for r, at, g in made.guesses if at and len(g) == most]
    assert len(full) > sum(len(r.output_ids) for r in requests) / every / 2
    ends = {r.id: {*r.params.stop_token_ids, *({} if r.params.ignore_eos else made.engine.eos_ids)} for r in requests}
    assert not any(ends[r.id].intersection(g) for r, _, g in made.guesses)


def other(model, config, tmp_path, seed):
    raw = {
        "qwen3": case("qwen3", head_dim=32, num_hidden_layers=1, max_position_embeddings=1000),
        "qwen3_5": hybrid(max_position_embeddings=1000),
        "qwen3_windows": {**promised["qwen3_windows"], "max_position_embeddings": 1000},
    }[config]
    return load(tiny.write(tmp_path / config, raw, tiny.tensors(raw, seed)), max_context=1000)


@pytest.mark.parametrize("config", (*CONFIGS, "qwen3_windows"))
def test_another_model_guesses_what_it_would_say_itself(model, watched, config, tmp_path):
    """Each guess is how the draft model alone goes on from the known tokens, whatever it guessed wrong before."""
    draft = other(model, config, tmp_path, 5)
    made = watched(model, draft, most=3)
    made.run()
    alone = Engine(draft, EngineOptions(threads=1), eos_ids=made.engine.eos_ids)
    rng = np.random.default_rng(0)
    full = [each for each in made.guesses if len(each[2]) == 3 and not each[0].params.min_tokens]
    for index in rng.choice(len(full), 40, replace=False):
        request, at, guesses = full[index]
        params = dataclasses.replace(request.params, max_tokens=3, prompt_logprobs=None, stop_token_ids=())
        if request.params.repetition_penalty != 1 or request.params.presence_penalty:
            continue  # these tell an answer from its prompt
        ids = request.prompt_ids + request.output_ids[:at]
        again = alone.add(ids, params)
        while alone.has_work:
            alone.step()
        assert again.output_ids == guesses[: len(again.output_ids)]
    alone.close()


def test_prompts_are_read_a_part_in_each_step(model, watched, monkeypatch):
    monkeypatch.setattr(draft_model, "CATCH_UP", 16)
    made, widths = watched(model, model, max_step_tokens=64), []
    stepped = made.drafts.runner.step

    def step(spans, clock=None):
        widths.append(sum(len(span.token_ids) for span in spans))
        return stepped(spans, clock)

    made.drafts.runner.step = step
    made.run()
    assert max(widths) <= 16 + 5
    assert not wrong(made.guesses) and any(g for _, _, g in made.guesses)
    assert any(at and not g for r, at, g in made.guesses if r.id == 2)  # it was behind
    assert all(made.behind[r.id, at] == (not g) for r, at, g in made.guesses if r.params.ignore_eos and 0 < at < 38)


def test_preempted_and_cancelled_requests_give_their_memory_back(model, watched):
    made = watched(model, model, kv_tokens=64 * 6, max_requests=4, max_step_tokens=50)
    long = [dataclasses.replace(s, max_tokens=100, min_tokens=0, stop_token_ids=(), ignore_eos=True) for s in PARAMS]
    requests = [made.engine.add(p, s) for p, s in zip(PROMPTS, long, strict=True)]
    while made.engine.has_work:
        made.step()
        if made.num_steps == 40:
            made.engine.cancel(requests[0])
        held = {f.request for f in made.drafts.sequences.values() if f.pages[0].ids}
        gone = {r for r in held if r.slot is None}
        made.drafts.guess([], 0)
        assert not gone.intersection(f.request for f in made.drafts.sequences.values())
    assert sum(r.num_preemptions for r in requests) and not made.drafts.sequences
    assert not wrong(made.guesses) and sum(bool(g) for _, _, g in made.guesses) > 50


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(model, watched):
    made, read = watched(model, model), []
    stepped, params = made.drafts.runner.step, SamplingParams(max_tokens=20, temperature=0.8, ignore_eos=True)

    def step(spans, clock=None):
        read.extend(position for span in spans for position in range(span.start, span.start + len(span.token_ids)))
        return stepped(spans, clock)

    def turn(ids, salt):
        """(the request, the first position that was read)."""
        read.clear()
        request = made.engine.add(ids, params, cache_salt=salt)
        while made.engine.has_work:
            made.step()
        return request, min(read)

    made.drafts.runner.step = step
    first, begun = turn(PROMPTS[2], "a")
    assert begun == 0
    more = first.prompt_ids + first.output_ids + [5, 6, 7]
    second, begun = turn(more, "a")
    assert first.num_tokens - 8 < begun < first.num_tokens
    assert turn(more, "b")[1] == 0  # another salt
    edited = [*more[:100], 4, *more[101:]]
    _, begun = turn(edited, "a")
    assert begun == (64 if not model_has_states(model) else 0)
    assert not wrong(made.guesses) and second.output_ids


def model_has_states(model):
    return any(cache.kind == "state" for cache in model.recorded.caches)


def test_what_was_left_is_given_up_for_others(model, watched):
    made = watched(model, model, max_requests=2, kv_tokens=64 * 9)
    for round in range(3):
        prompts = [[3 + (i * i + round) % 90 for i in range(n)] for n in (150, 70, 200)]
        made.run(prompts, [SamplingParams(max_tokens=30, seed=i, temperature=0.8, ignore_eos=True) for i in range(3)])
        assert len(made.drafts.memory.leftovers) <= 2
    assert not wrong(made.guesses)
    late = {r.id for r, at, g in made.guesses if g and r.id >= 6}
    assert late == {6, 7, 8}


def test_a_request_without_pages_gets_no_guesses_and_no_request_waits(model, watched):
    made = watched(model, model, kv_tokens=64 * 9)
    [allocator] = made.drafts.memory.pages.allocators
    taken = allocator.take(5)
    requests = made.run()
    assert all(r.finish_reason in ("stop", "length") for r in requests) and not wrong(made.guesses)
    drafted = {r.id for r, _, g in made.guesses if g}
    assert 0 < len(drafted) < len(requests)
    allocator.give_back(taken)


def test_a_shorter_context_ends_the_guesses(model, watched, tmp_path):
    short = dataclasses.replace(model, max_context=80)
    made = watched(model, short)
    made.run()
    assert not wrong(made.guesses)
    assert max(r.num_tokens and len(r.prompt_ids) + at + len(g) for r, at, g in made.guesses if g) == 80


def test_a_step_that_was_broken_off_is_no_harm(model, watched):
    made = watched(model, model)
    request = made.engine.add(PROMPTS[1], PARAMS[1])
    for _ in range(6):
        made.step()
    again = [made.drafts.guess([(request, 4)], 1)[request.id] for _ in range(3)]
    assert again[0] and all(g in ([], again[0]) for g in again)
    while made.engine.has_work:
        made.step()
    assert not wrong(made.guesses) and made.guesses[-4][2]


def test_a_nan_ends_the_guesses_of_its_request_alone(model, watched, tmp_path):
    raw = case("qwen3", head_dim=32, num_hidden_layers=1)
    arrays = tiny.tensors(raw, 3)
    arrays["lm_head.weight"][5] = 0
    arrays["lm_head.weight"][5, 3] = 3e38  # one logit overflows where one number of the hidden state is above 1.1
    made = watched(model, load(tiny.write(tmp_path / "m", raw, arrays)), most=2)
    params = [SamplingParams(max_tokens=40, temperature=0.8, seed=i, ignore_eos=True) for i in range(5)]
    requests = made.run([p[:9] for p in PROMPTS], params)
    assert all(r.finish_reason == "length" and np.isfinite(r.logprobs).all() for r in requests)
    ended = []
    for request in requests:
        had = [len(g) for r, at, g in made.guesses if r is request and 0 < at < 38]
        ended.append(next((i for i, count in enumerate(had) if count < 2), len(had)))
        assert not any(had[ended[-1] + 1 :])
    assert len(set(ended)) > 2 and min(ended) < max(ended) and sum(at < 37 for at in ended) > 1, ended


def test_another_vocabulary_is_refused(model, watched, tmp_path):
    raw = case("qwen3", head_dim=32, vocab_size=97)
    draft = load(tiny.write(tmp_path / "m", raw, tiny.tensors(raw, 3)))
    with pytest.raises(ValueError, match="the draft model has another vocabulary: 97 tokens, expected 96"):
        draft_model.check_vocabulary(model, draft)


# ---------------------------------------------------------------- in an engine


@pytest.fixture
def engine():
    """Makes engines, and ends their threads."""
    made = []

    def make(model, smaller=None, **options):
        speculate = "off" if smaller is None else "model"
        options = {"threads": 1, "max_requests": 3, "speculate": speculate, **options}
        made.append(Engine(model, EngineOptions(**options), draft_model=smaller))
        return made[-1]

    yield make
    for one in made:
        one.close()


def run(engine, params=PARAMS):
    requests = [engine.add(p, s) for p, s in zip(PROMPTS, params, strict=True)]
    while engine.has_work:
        engine.step()
    return requests


def answers(requests):
    return [(r.output_ids, r.logprobs, r.top_logprobs, r.prompt_logprobs, r.finish_reason) for r in requests]


@pytest.mark.parametrize("draft", [1, 4, 15])
def test_drafts_of_the_model_itself_are_all_right(model, engine, draft):
    expected = answers(run(engine(model)))
    made = engine(model, model, draft=draft)
    requests = run(made)
    assert answers(requests) == expected
    assert all(r.num_accepted == r.num_drafted > 0 for r in requests)
    drafted = sum(r.num_drafted for r in requests)
    assert drafted > 0.6 * draft / (1 + draft) * sum(len(r.output_ids) for r in requests)
    counts = made.drafter.counts["model"]
    assert counts.drafted == counts.right and sum(counts.drafted[:draft]) == drafted and counts.drafted[0]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    "options", [dict(draft=5, threads=2), dict(), dict(draft=3, kv_tokens=320, max_step_tokens=50)], ids=str
)
def test_drafts_of_another_model_change_no_answer(model, engine, config, options, tmp_path):
    plain = {name: value for name, value in options.items() if name != "draft"}
    params = [dataclasses.replace(p, ignore_eos=True, stop_token_ids=()) for p in PARAMS]
    expected = answers(run(engine(model, **plain), params))
    made = engine(model, other(model, config, tmp_path, 5), **options)
    requests = run(made, params)
    assert answers(requests) == expected
    if "draft" in options:  # else it follows the clock
        assert sum(r.num_drafted for r in requests) > sum(r.num_accepted for r in requests)
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages
    assert not made.drafter.head.sequences
    check_all_is_back(made.drafter.head.memory, made.limits)


def test_a_model_whose_guesses_are_wrong_is_hardly_asked(model, engine, tmp_path):
    raw = case("qwen3", head_dim=32, num_hidden_layers=1, max_position_embeddings=1000)
    arrays = tiny.tensors(raw, 3)
    arrays["lm_head.weight"][:] = 0  # it always says token 0
    made = engine(model, load(tiny.write(tmp_path / "m", raw, arrays), max_context=1000))
    long = SamplingParams(max_tokens=600, ignore_eos=True)
    request, counted, stepped = made.add(PROMPTS[1], long), [], made.drafter.head.runner.step

    def step(spans, clock=None):
        counted.append(len(request.output_ids))
        return stepped(spans, clock)

    made.drafter.head.runner.step = step
    while made.has_work:
        made.step()
    # its prompt is read; every 24 tokens one guess is tried, if sure ones would pay by the clock
    assert counted and len([at for at in counted if at > 300]) < 60


def test_an_engine_wants_a_model_with_that_source_only(model):
    for speculate, draft in (("model", None), ("lookup", model), ("off", model)):
        with pytest.raises(ValueError, match="draft_model: expected a model with speculate 'model' only, got"):
            Engine(model, EngineOptions(speculate=speculate, threads=1), draft_model=draft)


@pytest.mark.parametrize("config", CONFIGS)
def test_memory_of_both_models_is_counted(model, engine, config, tmp_path, monkeypatch):
    draft, options = other(model, config, tmp_path, 1), dict(max_requests=3, prefix_cache=False, speculate="model")
    made = engine(model, draft, **options)
    runners = made.runner, made.drafter.head.runner
    pages = sum(a.nbytes for r in runners for n, a in r.caches.items() if n.endswith("_pages"))
    others = sum(a.nbytes for r in runners for n, a in r.caches.items() if not n.endswith("_pages"))
    needed = cache_size.needs(model, EngineOptions(**options), draft)
    assert (
        cache_size.cache_bytes(needed, made.limits.num_pages, EngineOptions(**options)) == pages
        and needed.request * 3 == others
    )
    assert needed.weights == sum(cache_size.weight_bytes(each.recorded) for each in (model, draft))
    free = needed.weights + 2 * (others + 100 * needed.pages[0])
    monkeypatch.setattr(cache_size, "available_bytes", lambda: free)
    monkeypatch.setattr(cache_size, "LEAST_CONTEXT", 64)
    size = cache_size.context_size(model, EngineOptions(**options), None, draft)
    assert size.num_tokens == min(6400, model.config.max_positions)
    assert cache_size.num_pages(dataclasses.replace(model, max_context=64 * 60), EngineOptions(**options), draft) == 100
