"""Drafts change nothing but speed: not answers, log-probabilities or cached bytes, nor which requests run or are
preempted."""

from dataclasses import replace

import numpy as np
import pytest

from lockstep.engine.cache.memory import Memory
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import SamplingParams
from lockstep.engine.speculation.drafts import MAX_DRAFTS, Drafter
from lockstep.ops import BACKENDS
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from tests.promise.models import Case, load
from tests.speculation.masks import FewAfterEach
from tests.speculation.sources import source_of
from tests.speculation.subjects import HesitantMask

VOCABULARY = 96


def repetitive(seed, length):
    """A text of a few phrases, so that its last tokens occur earlier in it."""
    rng = np.random.RandomState(seed)
    phrases = [rng.randint(3, VOCABULARY, n).tolist() for n in (3, 7, 12)]
    return [token for i in rng.randint(0, 3, length) for token in phrases[i]][:length]


PROMPTS = [repetitive(i, n) for i, n in enumerate((1, 70, 3, 33, 129, 16, 62, 64))]
PARAMS = [
    SamplingParams(max_tokens=70, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.8, seed=1, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=1, temperature=1.0, seed=2),
    SamplingParams(max_tokens=90, repetition_penalty=0.4, frequency_penalty=-0.5, min_tokens=60, logprobs=0),
    SamplingParams(
        max_tokens=30, prompt_logprobs=2, presence_penalty=-1.5, logit_bias={5: 3.0, 9: 3.0}, ignore_eos=True
    ),
    SamplingParams(max_tokens=50, temperature=0.05, seed=5, stop_token_ids=tuple(range(0, 96, 11)), min_tokens=9),
    SamplingParams(max_tokens=25, temperature=1.0, seed=6, top_k=2, min_p=0.1, ignore_eos=True),
    SamplingParams(max_tokens=66, suppress_tokens=tuple(range(20, 96)), ignore_eos=True),
]


@pytest.fixture(scope="module", params=["qwen3", "mistral_window", "qwen3_5"])
def model(request, tmp_path_factory):
    return load(Case(request.param, "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model):
    """Makes engines, and ends their threads."""
    made = []

    def make(source=None, swaps=None, **options):
        options = {"threads": 1, "max_requests": 3, "speculate": "lookup", **options}
        made.append(Engine(model, EngineOptions(**options), swaps))
        if source is not None:
            drafts, eos_ids = made[-1].drafter, made[-1].eos_ids
            assert drafts is not None
            made[-1].drafter = Drafter(made[-1].scheduler, source_of(source), options.get("draft", 4), eos_ids)
        return made[-1]

    yield make
    for one in made:
        one.close()


def run(engine, params=PARAMS):
    """The Requests of all prompts, run together to their ends."""
    requests = [engine.add(p, s) for p, s in zip(PROMPTS, params, strict=True)]
    while engine.has_work:
        engine.step()
    return requests


def answer(r):
    reports = r.logprobs, r.top_logprobs, r.prompt_logprobs, r.prompt_top_logprobs
    return (r.output_ids, *reports, r.finish_reason, r.stop_reason, r.error)


def pages(engine, requests):
    """{(window, name of a block): the bytes of its page}, of all cached blocks of some requests."""
    memory, pool, made = Memory(engine.runner.program, engine.runner.caches), engine.scheduler.pages, {}
    names = [n for r in requests for n in engine.scheduler.prefix.names(r, (r.num_tokens - 1) // PAGE_TOKENS)]
    for number, (group, allocator) in enumerate(zip(pool.groups, pool.allocators, strict=True)):
        for name in names:
            page = allocator.find(name)
            if page is not None:
                out = np.zeros(memory.page_bytes[number], np.uint8)
                memory.read_page(number, page, out)
                made[group.window, name] = out.tobytes()
    return made


def same_pages(found, known):
    """Whether pages equal those of another engine. Engines may keep different pages behind a window."""
    whole = [{key for key in each if not key[0]} for each in (found, known)]
    both = found.keys() & known.keys()
    return whole[0] == whole[1] and bool(both) and all(found[key] == known[key] for key in both)


@pytest.fixture(scope="module")
def alone(model):
    """(answers, cached pages) of an engine without drafts that runs one request and one token at a time."""
    made = Engine(model, EngineOptions(max_step_tokens=1, max_requests=1, threads=1, kv_tokens=64 * 40))
    requests = run(made)
    yield [answer(r) for r in requests], pages(made, requests)
    made.close()


def oracle(answers, right):
    """A source that knows the answers: `right(n)` of n drafts are right, all others are wrong."""

    def source(request, most):
        known = answers[PROMPTS.index(request.prompt_ids)][0][len(request.output_ids) :][:most]
        count = right(len(known))
        return known[:count] + [(token + 1) % VOCABULARY for token in known[count:]]

    return source


@pytest.mark.parametrize("draft", [1, 2, 4, 7, 15])
def test_lookup_changes_no_answer_and_no_cached_byte(engine, alone, draft):
    made = engine(draft=draft, kv_tokens=64 * 40)
    requests = run(made)
    assert [answer(r) for r in requests] == alone[0]
    assert same_pages(pages(made, requests), alone[1])
    assert sum(r.num_drafted for r in requests) > sum(r.num_accepted for r in requests) > 20
    counted = [sum(r.num_drafted for r in requests), sum(r.num_accepted for r in requests)]
    assert [made.counts()[name] for name in ("drafts", "accepted_drafts")] == counted
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages


@pytest.mark.parametrize("at", range(6))
def test_a_draft_may_be_wrong_at_any_place(engine, alone, at):
    made = engine(oracle(alone[0], lambda n: min(at, n)), draft=5, max_requests=8, max_step_tokens=100)
    requests = run(made)
    assert [answer(r) for r in requests] == alone[0]
    assert same_pages(pages(made, requests), alone[1])


@pytest.mark.parametrize("backend", ["reference", "per_token"])
def test_mixers_that_run_another_way_give_the_same_answers(engine, alone, model, backend):
    kind = "gated_delta" if any(op.kind == "gated_delta" for op in model.recorded.ops) else "attention"
    made = engine(oracle(alone[0], lambda n: min(2, n)), {kind: backend}, draft=5, kv_tokens=64 * 40)
    used = {op.kind: made.runner.executor.backend[op.kind] for op in made.runner.program.ops}
    mixers = [name for name in used if name.startswith(kind) and not name.startswith("attention_inputs")]
    assert mixers and all(used[name] is BACKENDS[backend][name] for name in mixers), used
    requests = run(made)
    assert [answer(r) for r in requests] == alone[0]
    assert same_pages(pages(made, requests), alone[1])


def test_right_drafts_save_steps(engine, alone):
    made, steps = engine(oracle(alone[0], lambda n: n), draft=4, max_requests=8), 0
    requests = [made.add(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
    while made.has_work:
        made.step()
        steps += 1
    assert [answer(r) for r in requests] == alone[0]
    assert all(r.num_accepted == r.num_drafted for r in requests)
    assert steps < max(len(r.output_ids) for r in requests) / 3


def noise(seed):
    rng = np.random.default_rng(seed)
    return lambda request, most: rng.integers(0, VOCABULARY, rng.integers(0, most + 1)).tolist()


@pytest.mark.parametrize(
    "options", [dict(), dict(max_step_tokens=5, threads=2), dict(kv_tokens=256, max_requests=6)], ids=str
)
def test_noise_in_any_company_changes_nothing(engine, alone, options):
    made = engine(noise(len(options)), draft=MAX_DRAFTS, **options)
    assert [answer(r) for r in run(made)] == alone[0]


LONG = [SamplingParams(max_tokens=150, ignore_eos=True, suppress_tokens=(50,), repetition_penalty=0.9)] * len(PROMPTS)
CROWDED = dict(kv_tokens=320, max_requests=6, max_step_tokens=50)  # answers outgrow their pages


def preemptions(engine):
    """([(step, request)] of preemptions, the number of evicted blocks, the answers)."""
    made, requests, step = [], [engine.add(p, s) for p, s in zip(PROMPTS, LONG, strict=True)], 0
    while engine.has_work:
        before = [r.num_preemptions for r in requests]
        engine.step()
        made += [(step, i) for i, r in enumerate(requests) if r.num_preemptions > before[i]]
        step += 1
    return made, engine.scheduler.pages.num_evicted, [answer(r) for r in requests]


def test_wrong_drafts_preempt_no_request_and_evict_nothing(engine):
    wrong = engine(lambda request, most: [50] * most, draft=MAX_DRAFTS, **CROWDED)
    expected = preemptions(engine(speculate="off", **CROWDED))
    assert preemptions(wrong) == expected and expected[0] and expected[1]


def test_preempted_requests_go_on_drafting(engine):
    made = engine(draft=7, **CROWDED)
    moved, _, found = preemptions(made)
    assert moved and made.num_accepted > 50
    assert found == preemptions(engine(speculate="off", **CROWDED))[2]


def test_drafts_take_only_what_a_step_has_left(engine, alone):
    made = engine(oracle(alone[0], lambda n: n), draft=MAX_DRAFTS, max_step_tokens=8, max_requests=4)
    for p, s in zip(PROMPTS, PARAMS, strict=True):
        made.add(p, s)
    widths, stepped = [], made.runner.step

    def step(spans, clock=None):
        widths.append(sum(len(span.token_ids) for span in spans))
        return stepped(spans, clock)

    made.runner.step = step
    while made.has_work:
        made.step()
    assert max(widths) == 8


def test_nothing_is_drafted_past_an_end_token_or_the_last_token(engine):
    made, seen = engine(lambda request, most: [7, 8, 2, 9][:most]), []
    stepped = made.runner.step

    def step(spans, clock=None):
        seen.extend(tuple(span.token_ids) for span in spans)
        return stepped(spans, clock)

    made.runner.step = step
    made.add([3], SamplingParams(max_tokens=20, stop_token_ids=(8,), min_tokens=20))
    made.add([3], SamplingParams(max_tokens=2, ignore_eos=True))
    while made.has_work:
        made.step()
    assert max(map(len, seen)) == 2 and any(len(ids) == 2 for ids in seen)


@pytest.mark.parametrize("draft", [1, 3, 15, None])
def test_what_a_mask_forces_is_drafted_and_what_it_forbids_is_not(engine, draft):
    params = [replace(each, logits_mask=FewAfterEach(VOCABULARY)) for each in PARAMS]
    expected = [answer(r) for r in run(engine(speculate="off"), params)]
    allowed, failed = FewAfterEach(VOCABULARY), sum(error is not None for *_, error in expected)
    for source in (None, lambda request, most: [7] * most):
        made = engine(source, draft=draft)
        stepped = made.runner.step

        def step(spans, clock=None, stepped=stepped, made=made):
            by_slot = {r.slot: r for r in made.scheduler.running}
            for span in spans:
                text, drafts = by_slot[span.slot].output_ids, span.token_ids[len(span.token_ids) - span.num_drafts :]
                assert allowed.num_allowed(text, drafts) == span.num_drafts
            return stepped(spans, clock)

        made.runner.step = step
        assert [answer(r) for r in run(made, params)] == expected
        counts = made.draft_counts()["grammar"]
        # a request that is forced to a suppressed token ends, drafted or not; deeper drafts may follow a wrong one
        assert counts.drafted[0] - failed <= counts.right[0] <= counts.drafted[0] and counts.right[0] > (
            9 if draft else 0
        )


def test_a_users_mask_is_called_once_for_each_token(engine):
    calls = []

    def mask(output_ids):
        calls.append(len(output_ids))

    made = engine()
    request = made.add(repetitive(1, 60), SamplingParams(max_tokens=20, logits_mask=mask, ignore_eos=True))
    while made.has_work:
        made.step()
    assert calls == list(range(20)) and request.num_drafted == 0


def test_drafts_that_a_mask_cuts_keep_their_pages(engine):
    """Of 15 drafts around the end of a page the mask allows three; the next page must not go to another request."""
    params = SamplingParams(max_tokens=25, logits_mask=HesitantMask(VOCABULARY, 1), ignore_eos=True)
    off = run(engine(speculate="off"), [params] * 8)
    known = {tuple(r.prompt_ids): r.output_ids for r in off}
    made = engine(lambda r, most: known[tuple(r.prompt_ids)][len(r.output_ids) :][:most], draft=15, max_requests=8)
    on = run(made, [params] * 8)
    assert [answer(r) for r in on] == [answer(r) for r in off]
    assert all(r.num_accepted > 10 for r in on)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(speculate="mtp2"), "speculate: expected one of off, auto, mtp, lookup, model, got 'mtp2'"),
        (dict(speculate=None), "speculate: expected one of off, auto, mtp, lookup, model, got None"),
        (dict(draft=0), "draft: expected an integer of at least 1 .and at most 15., got 0"),
        (dict(draft=16), "draft: expected an integer of at least 1 .and at most 15., got 16"),
        (dict(draft=True), "draft: expected an integer"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**changed)


def kept_states(engine, requests):
    """{name of a block: the bytes of the state after it}, of all kept states of some requests."""
    prefix, made = engine.scheduler.prefix, {}
    for r in requests:
        for name in prefix.names(r, (r.num_tokens - 1) // PAGE_TOKENS):
            if prefix.states is not None and name in prefix.states:
                made[name] = prefix.states.get(name).tobytes()
    return made


def test_the_same_states_are_kept_and_the_same_prefixes_are_found(engine, model):
    """The requests run one after another, so that each step has the same requests in both engines. The second round
    goes on from the answers of the first."""
    found = []
    for options in (dict(draft=5), dict(speculate="off")):
        made, seen = engine(state_every=128, prompt_state_from=0, max_requests=1, kv_tokens=64 * 60, **options), []
        for prompt, params in zip(PROMPTS, LONG, strict=True):
            first = made.add(prompt, params)
            while made.has_work:
                made.step()
            second = made.add(prompt + first.output_ids + [3, 4, 5], params)
            while made.has_work:
                made.step()
            seen += [(answer(r), r.num_cached, kept_states(made, [r]), pages(made, [r])) for r in (first, second)]
        found.append(seen)
    assert found[0] == found[1]
    assert any(cached > 64 for _, cached, _, _ in found[0])
    recurrent = any(cache.kind == "state" for cache in model.recorded.caches)
    assert any(states for _, _, states, _ in found[0]) == recurrent
