"""Sources of drafts for tests: some know the answer and are right or wrong on purpose, some know nothing."""

from collections.abc import Callable

import numpy as np

from lockstep.engine.engine import Engine
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.engine.speculation.drafts import MAX_DRAFTS, MODEL, Drafter, Source
from lockstep.engine.speculation.lookup import Guess

Answers = Callable[[Request], list[int]]  # the answer that a request will get
Guesses = Callable[[Request, int], list[int]]  # (request, most tokens) -> guesses of its next tokens
Maker = Callable[[Answers, np.random.Generator, int], Guesses]  # (answers, rng, size of the vocabulary)


def source_of(guesses: Guesses) -> Source:
    """A Source of these guesses, which has none after other drafts."""
    return lambda request, most, drafts: Guess([] if drafts else guesses(request, most), "test")


def rest(answers: Answers, request: Request, most: int) -> list[int]:
    """The next tokens of the answer, up to `most`."""
    return answers(request)[len(request.output_ids) :][:most]


def right(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Always right."""
    return lambda request, most: rest(answers, request, most)


def past_the_end(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Right to the end of the answer, with random tokens after it."""

    def source(request: Request, most: int) -> list[int]:
        return (rest(answers, request, most) + rng.integers(0, vocab_size, most).tolist())[:most]

    return source


def noise(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """A random number of random tokens."""
    return lambda request, most: rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist()


def repeats(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """The last token, again and again."""
    return lambda request, most: request.token_ids(request.num_tokens - 1, request.num_tokens) * most


def wrong(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Always wrong: any token but the next one of the answer."""

    def source(request: Request, most: int) -> list[int]:
        return [(token + 1 + int(rng.integers(vocab_size - 1))) % vocab_size for token in rest(answers, request, most)]

    return source


def mostly_right(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Each draft is right in seven of ten cases."""

    def source(request: Request, most: int) -> list[int]:
        known = rest(answers, request, most)
        return [token if rng.random() < 0.7 else (token + 1) % vocab_size for token in known]

    return source


def wrong_at(place: int) -> Maker:
    """Wrong at one place, and right everywhere else."""

    def maker(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
        def source(request: Request, most: int) -> list[int]:
            known = rest(answers, request, most)
            return [token if i != place else (token + 1) % vocab_size for i, token in enumerate(known)]

        return source

    return maker


KNOWING: dict[str, Maker] = {
    "right": right,
    "past the end": past_the_end,
    "noise": noise,
    "repeats": repeats,
    "wrong": wrong,
    "mostly right": mostly_right,
    **{f"wrong at {place}": wrong_at(place) for place in range(MAX_DRAFTS)},
}
BUILT_IN = ("lookup", MODEL, "auto", "mtp")


def built_in(model: Model) -> list[str]:
    """The sources in BUILT_IN that a model can have."""
    return [name for name in BUILT_IN if name != "mtp" or model.drafts_by_mtp("auto")]


def plant(engine: Engine, guesses: Guesses, num_drafts: int | None) -> None:
    """Replaces the guesses of an engine with drafts. num_drafts: at most the number for which the engine was made."""
    assert engine.drafter is not None, "the engine was made without speculation"
    engine.drafter = Drafter(engine.scheduler, source_of(guesses), num_drafts, engine.eos_ids)
