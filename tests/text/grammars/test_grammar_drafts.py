"""Requests under real grammars answer the same with drafts, at any width, and their forced tokens are drafts."""

from dataclasses import replace

import pytest

from lockstep import LLM, SamplingParams
from lockstep.engine.speculation.drafts import MAX_DRAFTS, Drafter, look_up
from lockstep.text.grammars import structured
from lockstep.text.grammars.structured import Grammars
from tests.speculation.sources import source_of

SIZES = dict(threads=1, max_requests=4, max_context=512)
PERSON = structured.json_schema(
    dict(
        type="object",
        required=["first_name", "favourite_colour"],
        additionalProperties=False,
        properties=dict(
            first_name=dict(type="string", maxLength=8),
            favourite_colour=dict(enum=["green", "greenish", "blue"]),
            is_known=dict(type="boolean"),
        ),
    )
)
LINES = structured.regex("(the (quick|slow) brown fox\n){1,9}")
THOUGHT = structured.compose('start: "<think>" /[a-z ]{1,12}/ "</think>\\n" /[0-9]{1,5}/ " = the answer"')
CALL = structured.choice([" = call_the_tool(now)", " = call_the_other(now)"])
PROMPTS = ["def f(x):\n", "the quick brown fox\nthe quick", "import os\n", "x"]


@pytest.fixture(scope="module")
def plain():
    made = LLM(**SIZES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def guessing():
    made = LLM(**SIZES, speculate="lookup", draft=MAX_DRAFTS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def grammars(plain):
    made = Grammars(plain.tokenizer, plain.engine.eos_ids, plain.vocab_size)
    yield made
    made.close()


@pytest.fixture(scope="module")
def asked(grammars, plain):
    """Makes SamplingParams for the prompts, each with a new mask."""
    [begin] = plain.tokenizer.encode("\n", add_special_tokens=False)
    free = dict(ignore_eos=True)

    def make():
        return [
            SamplingParams(max_tokens=60, logits_mask=grammars.mask(PERSON), temperature=1.0, seed=3, logprobs=2),
            SamplingParams(max_tokens=70, logits_mask=grammars.mask(LINES), min_tokens=40, repetition_penalty=0.9),
            SamplingParams(max_tokens=50, logits_mask=grammars.mask(THOUGHT), temperature=0.8, seed=4, min_tokens=45),
            SamplingParams(max_tokens=60, logits_mask=grammars.mask(CALL, 1, begin), temperature=1.0, seed=6, **free),
        ]

    return make


def told(answers):
    return [(a.token_ids, a.logprobs, a.top_logprobs, a.finish_reason, a.stop_reason, a.error, a.text) for a in answers]


@pytest.fixture(scope="module")
def expected(plain, asked):
    made = told(plain.generate(PROMPTS, asked()))
    assert not any(error for *_, error, _ in made)
    assert "favourite_colour" in made[0][-1] and "fox" in made[1][-1] and "= the answer" in made[2][-1]
    assert "= call_the_" in made[3][-1]
    return made


def grammar_counts(llm):
    made = llm.engine.draft_counts().get("grammar")
    return (sum(made.drafted), sum(made.right)) if made else (0, 0)


@pytest.mark.parametrize("draft", [1, 2, 3, 4, 5, 7, 10, 15, None])
@pytest.mark.parametrize("source", ["lookup", "none", "noise"])
def test_answers_are_the_same_and_what_is_forced_is_drafted(guessing, asked, expected, draft, source):
    engine = guessing.engine
    guesses = dict(
        lookup=look_up,
        none=source_of(lambda request, most: []),
        noise=source_of(lambda request, most: [(7 * request.num_tokens + 31 * i) % 4096 for i in range(most)]),
    )
    engine.drafter = Drafter(engine.scheduler, guesses[source], draft, engine.eos_ids)
    assert told(guessing.generate(PROMPTS, asked())) == expected
    drafted, right = grammar_counts(guessing)
    assert drafted >= right > (40 if draft else 0)
    if source == "none":
        assert drafted == right


def test_forced_tokens_save_steps(guessing, asked, expected, grammars):
    """Forced tokens are drafts even where lookup finds none."""
    engine, steps = guessing.engine, 0
    engine.drafter = Drafter(engine.scheduler, source_of(lambda request, most: []), 15, engine.eos_ids)
    stream = guessing.stream(PROMPTS[0], asked()[0])
    for chunk in stream:
        steps += bool(chunk.token_ids)
    assert stream.completion.token_ids == expected[0][0] and stream.request.num_accepted > 5
    assert steps <= len(expected[0][0]) - stream.request.num_accepted + 1


def test_samples_under_one_mask_and_preempted_ones(guessing, plain, grammars):
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=9, n=4)
    answers = []
    for llm in (plain, guessing):
        if llm is guessing:
            llm.engine.drafter = Drafter(llm.engine.scheduler, look_up, 7, llm.engine.eos_ids)
        streams = llm.start_samples("def g(", replace(params, logits_mask=grammars.mask(PERSON, 4)))
        steps = 0
        while llm.engine.has_work:
            llm.engine.step()
            steps += 1
            if steps in (3, 6) and llm.engine.scheduler.running:
                llm.engine.scheduler.preempt(llm.engine.scheduler.running[-1])
        answers.append([(s.request.output_ids, s.request.logprobs, s.request.finish_reason) for s in streams])
    assert answers[0] == answers[1]
