"""Where drafts come from when they are to do harm: sources that know the answer, and sources that know nothing."""

from collections.abc import Callable

import numpy as np

from lockstep.engine.engine import Engine
from lockstep.engine.model import Model
from lockstep.engine.request import Request
from lockstep.engine.speculation.drafts import MAX_DRAFTS, MODEL, Drafter, Source
from lockstep.engine.speculation.lookup import Guess

Answers = Callable[[Request], list[int]]  # what a request will be answered with
Guesses = Callable[[Request, int], list[int]]  # (request, at most how many): what may come next
Maker = Callable[[Answers, np.random.Generator, int], Guesses]  # (answers, rng, vocabulary)


def source_of(guesses: Guesses) -> Source:
    """A Source that knows nothing to follow other drafts."""
    return lambda request, most, drafts: Guess([] if drafts else guesses(request, most), "test")


def rest(answers: Answers, request: Request, most: int) -> list[int]:
    """What is to come, as far as the answer goes."""
    return answers(request)[len(request.output_ids) :][:most]


def right(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Right everywhere."""
    return lambda request, most: rest(answers, request, most)


def past_the_end(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Right until the end token (or the end of a stop string), and on after it."""

    def source(request: Request, most: int) -> list[int]:
        return (rest(answers, request, most) + rng.integers(0, vocab_size, most).tolist())[:most]

    return source


def noise(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Random tokens, random in number."""
    return lambda request, most: rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist()


def repeats(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """The last token, again and again."""
    return lambda request, most: request.token_ids(request.num_tokens - 1, request.num_tokens) * most


def wrong(answers: Answers, rng: np.random.Generator, vocab_size: int) -> Guesses:
    """Always wrong: any token but the one that comes."""

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
    """Right but for one place."""

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
    """Those of BUILT_IN that a model can have."""
    return [name for name in BUILT_IN if name != "mtp" or model.drafts_by_mtp("auto")]


def plant(engine: Engine, guesses: Guesses, num_drafts: int | None) -> None:
    """Gives an engine that speculates other guesses. num_drafts: at most those that the engine was made for."""
    assert engine.drafter is not None, "the engine was made without speculation"
    engine.drafter = Drafter(engine.scheduler, source_of(guesses), num_drafts, engine.eos_ids)
