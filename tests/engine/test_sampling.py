"""Penalties, biases, masks, min_tokens and log-probabilities in the engine: what they mean, and that other requests and
chunks change none of them."""

from dataclasses import replace

import numpy as np
import pytest

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import Request, SamplingParams
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import num_rows, within_rows
from lockstep.runtime.threads import Team
from tests.promise.models import Case, load

VOCABULARY = 96
PROMPTS = [np.random.RandomState(i).randint(3, 96, n).tolist() for i, n in enumerate((50, 110, 1, 55, 126, 16))]


def allow(*tokens):
    """A mask that allows these tokens."""
    bits = np.zeros(96, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def odd_after_even(output_ids):
    """A logits_mask that depends on the output, and is None now and then."""
    if len(output_ids) % 3 == 2:
        return None
    return allow(*range(len(output_ids) % 2, 96, 2))


PENALTIES = dict(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3)
PARAMS = [
    SamplingParams(max_tokens=25, **PENALTIES, ignore_eos=True, logprobs=20, prompt_logprobs=0),
    SamplingParams(max_tokens=30, temperature=0.9, seed=3, **PENALTIES, min_tokens=20, logprobs=1, prompt_logprobs=5),
    SamplingParams(max_tokens=20, logits_mask=odd_after_even, temperature=1.2, seed=4, logit_bias={9: 3.0, 95: -100}),
    SamplingParams(
        max_tokens=20, temperature=0.7, seed=5, frequency_penalty=-1.0, min_p=0.02, ignore_eos=True, logprobs=3
    ),
    SamplingParams(max_tokens=9, prompt_logprobs=20, logits_mask=odd_after_even, min_tokens=9, repetition_penalty=0.8),
    SamplingParams(max_tokens=12, temperature=1.0, seed=7, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(Case("qwen3_5", "f32", "bf16"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model):
    """Makes engines, and ends their threads."""
    made = []

    def make(**options):
        made.append(Engine(model, EngineOptions(**{"threads": 1, "max_requests": 3, **options})))
        return made[-1]

    yield make
    for one in made:
        one.close()


def finish(engine):
    while engine.has_work:
        engine.step()


def answer(r):
    reports = r.logprobs, r.top_logprobs, r.prompt_logprobs, r.prompt_top_logprobs
    return (r.output_ids, *reports, r.finish_reason, r.error)


def answers(engine, prompts=PROMPTS, params=PARAMS):
    requests = [engine.add(p, s) for p, s in zip(prompts, params, strict=True)]
    finish(engine)
    return [answer(r) for r in requests]


@pytest.fixture(scope="module")
def alone(model):
    """The answers of an engine that runs one request and one token at a time."""
    made = Engine(model, EngineOptions(max_step_tokens=1, max_requests=1, threads=1))
    yield answers(made)
    made.close()


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_step_tokens=7),
        dict(max_step_tokens=64, max_requests=8, threads=3),
        dict(max_step_tokens=3, max_requests=1),
    ],
    ids=str,
)
def test_everything_at_once_is_the_same_in_any_company(engine, alone, options):
    assert answers(engine(**options)) == alone


def test_preempted_requests_and_known_prefixes_change_nothing(engine, alone):
    made = engine(kv_tokens=320, max_requests=6, max_step_tokens=50)
    rounds = [
        [made.add(p, s, priority=i) for i, (p, s) in enumerate(zip(PROMPTS, PARAMS, strict=True))] for _ in range(3)
    ]
    finish(made)
    assert [[answer(r) for r in requests] for requests in rounds] == [alone] * 3
    preempted = [r for requests in rounds for r in requests if r.num_preemptions]
    assert any(r.params.prompt_logprobs is not None for r in preempted) and any(r.adjustment for r in preempted)


def test_answers_have_what_was_asked_for(alone):
    for prompt, p, (ids, logprobs, tops, prompt_logprobs, prompt_tops, why, error) in zip(
        PROMPTS, PARAMS, alone, strict=True
    ):
        assert len(logprobs) == len(ids) and error is None and why in ("length", "stop")
        assert [len(t) for t in tops] == ([p.logprobs] * len(ids) if p.logprobs else [])
        asked = p.prompt_logprobs is not None
        assert len(prompt_logprobs) == (len(prompt) - 1) * asked
        assert [len(t) for t in prompt_tops] == ([p.prompt_logprobs] * (len(prompt) - 1) if p.prompt_logprobs else [])
        for token, logprob, top in zip(ids, logprobs, tops, strict=False):  # none where none were asked for
            assert list(top.items()) == sorted(top.items(), key=lambda pair: (-pair[1], pair[0]))
            assert top.get(token, logprob) == logprob and max(top.values()) >= logprob


def test_logprobs_of_a_prompt_are_those_of_the_same_tokens_when_they_were_generated(engine, alone):
    for chunk in (512, 11):
        made = engine(max_step_tokens=chunk)
        for prompt, (ids, logprobs, tops, *_) in zip(PROMPTS, alone, strict=True):
            count = len(next(iter(tops), ()))
            r = made.add(prompt + ids, SamplingParams(max_tokens=1, prompt_logprobs=count))
            finish(made)
            assert r.prompt_logprobs[len(prompt) - 1 :] == logprobs
            assert r.prompt_top_logprobs[len(prompt) - 1 :] == (tops if count else [])


# ---------------------------------------------------------------- what the options mean, in float64


@pytest.fixture(scope="module")
def logits_of(model):
    """A function from token ids to the logits of every position, float64."""
    team = Team(1)
    runner = Runner(model, team, Limits(256, 1, 4, 256))
    yield lambda ids: runner.step([Span(ids, 0, everywhere(range(4)), 0, {row: {} for row in range(len(ids))})])[
        2
    ].astype(float)
    team.close()


def changed(logits, prompt, output, p, eos_ids):
    """The logits of the token after an output, changed as SamplingParams describes."""
    x = logits.copy()
    for t in {*(prompt if p.repetition_penalty != 1 else ()), *output}:
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
        x[t] -= p.frequency_penalty * output.count(t) + p.presence_penalty * (t in output)
    for t, bias in p.logit_bias.items():
        x[t] += bias
    x[list(p.suppress_tokens)] = -np.inf
    mask = p.logits_mask(output) if p.logits_mask else None
    if mask is not None:
        x[~np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)[: len(x)]] = -np.inf
    if len(output) < p.min_tokens:
        x[[*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)]] = -np.inf
    return x


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.5),
        dict(repetition_penalty=0.6),
        dict(presence_penalty=2.0),
        dict(frequency_penalty=0.8),
        dict(frequency_penalty=-1.5, presence_penalty=-2),
        dict(logit_bias={5: 2.0, 60: 100, 61: -100}),
        dict(logits_mask=odd_after_even),
        dict(min_tokens=80, stop_token_ids=(7, 11)),
        dict(suppress_tokens=tuple(range(0, 96, 3)), logit_bias={3: 100}),
        dict(**PENALTIES, logit_bias={8: 2.5}, logits_mask=odd_after_even, min_tokens=3, suppress_tokens=(8, 50)),
    ],
    ids=lambda o: " ".join(o),
)
def test_a_greedy_answer_takes_the_largest_of_the_changed_logits(engine, logits_of, options):
    made, p = engine(), SamplingParams(max_tokens=80, ignore_eos="min_tokens" not in options, **options)
    made.eos_ids = frozenset({2, 13})
    r = made.add(PROMPTS[3], p)
    finish(made)
    logits = logits_of(PROMPTS[3] + r.output_ids)[len(PROMPTS[3]) - 1 :]
    differs = 0
    for n, token in enumerate(r.output_ids):
        x = changed(logits[n], PROMPTS[3], r.output_ids[:n], p, made.eos_ids)
        assert np.isfinite(x[token]) and x[token] >= x.max() - 1e-4, (n, token)
        exact = logits[n][token] - np.log(np.exp(logits[n] - logits[n].max()).sum()) - logits[n].max()
        assert abs(r.logprobs[n] - exact) < 1e-5
        differs += token != logits[n].argmax()
    assert differs, "the options made no difference"


def test_end_tokens_wait_for_min_tokens(engine, logits_of):
    made = engine()
    free = made.add(PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True))
    finish(made)
    made.eos_ids = frozenset({free.output_ids[0], free.output_ids[1]})
    first = made.add(PROMPTS[0], SamplingParams(max_tokens=30))
    later = made.add(PROMPTS[0], SamplingParams(max_tokens=30, min_tokens=6, logit_bias={free.output_ids[0]: 100}))
    finish(made)
    end = free.output_ids[0]
    assert (first.output_ids, first.finish_reason, first.stop_reason) == ([end], "stop", end)
    assert len(later.output_ids) == 7 and not made.eos_ids.intersection(later.output_ids[:6])
    assert (later.output_ids[6], later.finish_reason, later.stop_reason) == (end, "stop", end)


@pytest.mark.parametrize(
    "ends, options",
    [
        ({2, 95}, dict(temperature=0.9)),
        ({2}, dict(stop_token_ids=(95,))),
        (set(), dict(ignore_eos=True, stop_token_ids=(2, 95))),
    ],
)
def test_an_answer_ends_before_min_tokens_where_its_mask_allows_end_tokens_only(engine, ends, options):
    def mask(output_ids):
        return allow(2, 9, 95) if len(output_ids) < 3 else allow(2, 95)

    made = engine()
    made.eos_ids = frozenset(ends)
    request = made.add([4, 5], SamplingParams(max_tokens=9, min_tokens=6, logits_mask=mask, **options))
    finish(made)
    *before, end = request.output_ids
    assert (before, request.finish_reason, request.stop_reason) == ([9, 9, 9], "stop", end)


# ---------------------------------------------------------------- masks


def test_a_mask_is_asked_once_for_each_token(engine):
    asked = []

    def mask(output_ids):
        asked.append(list(output_ids))
        return allow(10 + len(output_ids)).view(np.int32)

    made = engine(max_step_tokens=8)
    r = made.add(PROMPTS[1], SamplingParams(max_tokens=4, logits_mask=mask, temperature=1.0))
    finish(made)
    assert r.output_ids == [10, 11, 12, 13] and asked == [[], [10], [10, 11], [10, 11, 12]]


NOTHING_ALLOWED = "no token is allowed by logits_mask, suppress_tokens and min_tokens together"


def raises(output_ids):
    if len(output_ids) == 2:
        raise KeyError("no such state")


@pytest.mark.parametrize(
    "mask, message",
    [
        (raises, "logits_mask raised KeyError: 'no such state'"),
        (lambda ids: np.zeros(4, np.uint32), "logits_mask: expected None or uint32 [3], got uint32 [4]"),
        (lambda ids: [[1], [1, 2]], "logits_mask raised ValueError: setting an array element with a sequence"),
        (lambda ids: np.ones(3), "logits_mask: expected None or uint32 [3], got float64 [3]"),
        (lambda ids: None if len(ids) < 2 else allow(), NOTHING_ALLOWED),
    ],
)
def test_a_mask_that_fails_ends_its_request_and_no_other(engine, alone, mask, message):
    made = engine(max_requests=8)
    made.eos_ids = frozenset({2})
    bad = made.add([4, 5], SamplingParams(max_tokens=9, temperature=0.8, logits_mask=mask, min_tokens=9))
    seen = []
    others = [made.add(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
    while made.has_work:
        seen += [r for r in made.step() if r is bad and r.finish_reason]
    assert (bad.finish_reason, seen) == ("error", [bad]) and bad.error.startswith(message)
    assert len(bad.output_ids) in (0, 2)
    assert [answer(r) for r in others] == alone
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages


@pytest.mark.parametrize("first", [True, False])
def test_a_mask_may_cancel_others_of_its_step(engine, first):
    made, others, free = engine(max_requests=8), [], SamplingParams(max_tokens=9, temperature=0.9, ignore_eos=True)
    expected = made.add(PROMPTS[2], free)
    finish(made)

    def cancels(output_ids):
        if len(output_ids) == 2:
            made.cancel(others[0])

    other = lambda: others.append(made.add([1, 2], free))
    if first:
        other()
    r = made.add(PROMPTS[2], replace(free, logits_mask=cancels))
    if not first:
        other()
    finish(made)
    assert answer(r) == answer(expected) and others[0].finish_reason == "cancelled" and len(others[0].output_ids) == 2
    assert made.scheduler.pages.num_free == made.scheduler.pages.num_pages


def test_a_request_that_fails_alone_leaves_nothing(engine):
    made = engine()
    bad = made.add([4, 5], SamplingParams(logits_mask=lambda ids: 5))
    assert made.step() == [bad] and not made.has_work and bad.finish_reason == "error"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(logit_bias={96: 1}), "logit_bias: token ids must be 0 to 95, got 96"),
        (dict(stop_token_ids=(1, 300)), "stop_token_ids: token ids must be 0 to 95, got 300"),
        (dict(suppress_tokens=[96]), "suppress_tokens: token ids must be 0 to 95, got 96"),
    ],
)
def test_token_ids_that_are_none_are_refused(engine, options, message):
    made = engine()
    with pytest.raises(ValueError, match=message):
        made.add([1, 2], SamplingParams(**options))
    assert not made.has_work


# ---------------------------------------------------------------- rows of a step


def request(num_prompt, computed, prompt_logprobs, reported=0):
    return Request(
        0,
        [1] * num_prompt,
        SamplingParams(prompt_logprobs=prompt_logprobs),
        num_computed=computed,
        prompt_logprobs=[0.0] * reported,
    )


def test_prompts_that_want_logprobs_are_cut_to_the_rows_there_are():
    plain, a, b = request(50, 0, None), request(50, 10, 0, 10), request(9, 0, 3)
    again = request(60, 0, 0, 40)  # preempted after 40 reports
    assert [num_rows(a, n) for n in (5, 39, 40)] == [5, 39, 40]
    assert [num_rows(b, 9), num_rows(again, 40), num_rows(again, 60)] == [9, 0, 20]
    assert within_rows([(plain, 50), (a, 30), (b, 9)], 64) == [(plain, 50), (a, 30), (b, 9)]
    assert within_rows([(plain, 50), (a, 40), (b, 9)], 16) == [(plain, 50), (a, 15)]
    assert within_rows([(b, 9), (plain, 50), (a, 40)], 12) == [(b, 9), (plain, 50), (a, 2)]
    assert within_rows([(again, 60)], 8) == [(again, 48)]


# ---------------------------------------------------------------- text


class Letters:
    """A detokenizer with two letters for each token; the second comes with the next token or the end."""

    def __init__(self):
        self._late = ""

    def push(self, token):
        shown, self._late = self._late + chr(0x100 + token), chr(0x400 + token)
        return shown

    def finish(self):
        return self._late


def letters(ids):
    return "".join(chr(0x100 + t) + chr(0x400 + t) for t in ids)


def test_the_engine_ends_a_request_at_a_stop_string_and_batch_mates_do_not_notice(model):
    made = Engine(model, EngineOptions(threads=2), new_detokenizer=lambda request: Letters())
    options = dict(max_tokens=20, temperature=1.0, ignore_eos=True)
    free = made.add(PROMPTS[0], SamplingParams(**options))
    finish(made)
    assert free.text == letters(free.output_ids)
    stop = free.text[12:15]  # ends with the first letter of the eighth token
    cut, other = (made.add(PROMPTS[0], SamplingParams(**options, stop=s)) for s in (stop, ()))
    shown = []
    while made.has_work:
        made.step()
        shown.append(cut.text)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (free.text[: free.text.index(stop)], "stop", stop)
    assert cut.output_ids == free.output_ids[:8] and answer(other) == answer(free)
    assert all(cut.text.startswith(s) for s in shown)
    made.close()


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(ValueError, match="stop: there is no tokenizer to read answers with; use stop_token_ids"):
        engine().add([1], SamplingParams(stop="x"))
