"""Wishes: random short requests that use every field of SamplingParams."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lockstep.engine.engine import Engine
from lockstep.engine.request import Request, SamplingParams
from tests.speculation.subjects import Subject

LENGTHS = (1, 2, 3, 17, 33, 63, 64, 65, 100, 128, 129, 150)  # of prompts, in tokens; some around the end of a page
MOST_TOKENS = (1, 2, 5, 16, 24, 40, 60, 90)  # of answers
TEMPERATURES = (0.0, 0.8, 1.0)


@dataclass(frozen=True)
class Wish:
    """A request that can be made to any engine of its Subject, any number of times.

    new_mask: makes the request's logits_mask, which may remember its calls; None: no mask. prediction: a text that the
    answer may resemble.
    """

    prompt_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    new_mask: Callable[[], Callable[[list[int]], Any]] | None = None
    prediction: list[int] = field(default_factory=list)

    def ask(self, engine: Engine, **options: Any) -> list[Request]:
        """Queues its samples; returns their Requests. options: further ones of `Engine.make`."""
        params = replace(self.params, logits_mask=self.new_mask()) if self.new_mask else self.params
        options |= dict(priority=self.priority, cache_salt=self.cache_salt, prediction=self.prediction)
        return engine.add_samples(self.prompt_ids, params, **options)


def wishes(subject: Subject, seed: int, count: int) -> list[Wish]:
    """`count` random wishes, the same for the same seed, with each temperature in turn; some ask for an embedding."""
    rng = np.random.default_rng(seed)
    return [_pooled(subject, rng) if i % 15 == 7 else _wish(subject, rng, TEMPERATURES[i % 3]) for i in range(count)]


def _pooled(subject: Subject, rng: np.random.Generator) -> Wish:
    """A wish for an embedding."""
    params = SamplingParams(pooling=str(rng.choice(("last", "mean"))))
    return Wish(_prompt(subject, rng), params, int(rng.integers(-1, 2)), "")


def _wish(subject: Subject, rng: np.random.Generator, temperature: float) -> Wish:
    n = int(rng.choice((1, 1, 1, 1, 1, 2, 3)))
    params = SamplingParams(temperature=temperature, n=n, **_choice(rng), **_end(subject, rng), **_report(rng, n))
    new_mask = None
    if rng.random() < 0.25:
        of_samples = subject.new_masks[rng.integers(len(subject.new_masks))]
        new_mask = lambda: of_samples(n)
    salt = str(rng.choice(("", "", "", "salt")))
    prediction = subject.texts[rng.integers(len(subject.texts))] if rng.random() < 0.2 else []
    return Wish(_prompt(subject, rng), params, int(rng.integers(-1, 2)), salt, new_mask, prediction)


def _prompt(subject: Subject, rng: np.random.Generator) -> list[int]:
    """A part of a text; half of the prompts begin where the text begins, and so share a prefix."""
    text, length = subject.texts[rng.integers(len(subject.texts))], int(rng.choice(LENGTHS))
    start = 0 if rng.random() < 0.5 else int(rng.integers(0, max(1, len(text) - length)))
    return text[start : start + length]


def _choice(rng: np.random.Generator) -> dict[str, Any]:
    """Parameters that change logits or leave out tokens."""
    made: dict[str, Any] = dict(seed=int(rng.integers(1 << 40)))
    if rng.random() < 0.3:
        made |= dict(repetition_penalty=float(rng.choice((0.7, 1.2))), frequency_penalty=float(rng.choice((-0.4, 0.5))))
    if rng.random() < 0.2:
        made |= dict(presence_penalty=float(rng.choice((-1.0, 0.7))))
    if rng.random() < 0.2:
        made |= dict(logit_bias={int(i): float(rng.uniform(-4, 4)) for i in rng.integers(0, 96, 5)})
    if rng.random() < 0.2:
        made |= dict(suppress_tokens=tuple(rng.integers(3, 96, 6).tolist()))
    if rng.random() < 0.2:
        made |= dict(top_k=int(rng.choice((1, 2, 40))), top_p=0.95)
    if rng.random() < 0.1:
        made |= dict(min_p=0.05)
    return made


def _end(subject: Subject, rng: np.random.Generator) -> dict[str, Any]:
    """Parameters that end the answer."""
    most = int(rng.choice(MOST_TOKENS))
    made: dict[str, Any] = dict(max_tokens=most, ignore_eos=bool(rng.random() < 0.5))
    if rng.random() < 0.3:
        made |= dict(min_tokens=int(rng.integers(0, most + 1)))
    if rng.random() < 0.3:
        text = subject.texts[rng.integers(len(subject.texts))]
        made |= dict(stop_token_ids=tuple({text[i] for i in rng.integers(0, len(text), 3)}))
    if subject.stops and rng.random() < 0.3:
        chosen = rng.integers(0, len(subject.stops), 2)
        made |= dict(stop=tuple({subject.stops[i] for i in chosen}))
        made |= dict(include_stop_str_in_output=bool(rng.random() < 0.5))
    return made


def _report(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Parameters that ask for log-probabilities."""
    made = {}
    if rng.random() < 0.5:
        made |= dict(logprobs=int(rng.choice((0, 1, 5, 20))))
    if rng.random() < 0.15:
        made |= dict(prompt_logprobs=int(rng.choice((0, 2))))
    return made
