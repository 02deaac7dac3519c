"""Answers that go on from random places, on other engines than the one that began them: the same, bit for bit.

A `Whole` has the answers to a set of wishes that nothing interrupted. A `Lot` of `tests.speculation.proof`, which says
beside which requests, with how little memory and with which drafts a part of the wishes runs, is run with the wishes
`Resumed`: each sample begins with a random number of the tokens of its whole answer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.answer_tokens import NotItsAnswer
from lockstep.engine.engine import Engine
from lockstep.engine.request import Request
from tests.speculation.proof import AMPLE, COMPANIES, Lot, Report, Run, compared, opened, run_on
from tests.speculation.sources import built_in
from tests.speculation.subjects import Subject
from tests.speculation.watch import Watch
from tests.speculation.wishes import Wish

STOPS = ("self.", " = self", "):\n", "\n    ", ".append(", "def ")  # stop sequences that several tokens make


def with_stops(subject: Subject) -> Subject:
    """A subject whose requests have stop sequences that may lie across a seam."""
    return replace(subject, stops=STOPS)


class Whole:
    """The answers to wishes that nothing interrupts, without drafts, all together on enough memory.

    certain: {id of a request: {number of tokens: characters of its text that were certain with them}}.
    """

    def __init__(self, subject: Subject, wishes: list[Wish]) -> None:
        self.subject, self.wishes = subject, wishes
        self.certain: dict[int, dict[int, int]] = {}
        with opened(subject, AMPLE) as engine:
            self.run = Run([wish.ask(engine) for wish in wishes], Watch(engine))
            requests = [request for samples in self.run.requests for request in samples]
            while engine.has_work:
                self.run.watch.step()
                for request in requests:
                    self.certain.setdefault(request.id, {0: 0})[len(request.output_ids)] = len(request.text)
        assert not self.run.watch.faults, self.run.watch.faults


@dataclass
class Resumed:
    """A Wish that begins with tokens of its answers. given: of each sample. recompute: their log-probabilities."""

    wish: Wish
    given: list[list[int]]
    recompute: bool

    def ask(self, engine: Engine) -> list[Request]:
        """Queues its samples; returns their Requests."""
        options: dict[str, Any] = dict(output_ids=self.given, recompute_logprobs=self.recompute)
        return self.wish.ask(engine, **options if any(self.given) else {})


@dataclass
class Continued:
    """A Menu, as `run_on` takes it, whose wishes are Resumed."""

    subject: Subject
    wishes: list[Resumed] = field(default_factory=list)
    run: Run = field(init=False)


def resumed(whole: Whole, seed: int) -> Continued:
    """All wishes, cut at random places; a quarter of all answers at their end or their beginning."""
    rng, made = np.random.default_rng(seed), Continued(whole.subject)
    made.run = whole.run
    for wish, requests in zip(whole.wishes, whole.run.requests, strict=True):
        given = [request.output_ids[: _place(rng, len(request.output_ids))] for request in requests]
        made.wishes.append(Resumed(wish, given, bool(rng.random() < 0.6)))
    return made


def _place(rng: np.random.Generator, num_tokens: int) -> int:
    """Where an answer is cut."""
    drawn = rng.random()
    if drawn < 0.25:
        return num_tokens if drawn < 0.15 else min(1, num_tokens)
    return int(rng.integers(0, num_tokens + 1))


def run_lot(whole: Whole, lot: Lot, folder: Path) -> Report:
    """Runs a lot of resumed wishes, and compares it with the whole answers. The report counts the resumed samples as
    "points"."""
    menu = resumed(whole, lot.seed)
    try:
        run = run_on(menu, lot, folder)
    except NotItsAnswer as error:
        return Report([f"{lot}: refused: {error}"])
    found = [f"{lot}: wish {index}: {what}" for index, what in _seams(whole, menu, lot, run)]
    report = compared(menu, lot, run)
    report.differences += found
    report.events = events(run)
    return report


def _seams(whole: Whole, menu: Continued, lot: Lot, run: Run) -> Iterator[tuple[int, str]]:
    """Differences at the seam of resumed answers; puts the logprobs of tokens that were not recomputed there, so that
    all of them can be compared."""
    for index, requests in zip(lot.indices, run.requests, strict=True):
        for off, on in zip(whole.run.requests[index], requests, strict=True):
            if on.num_given_characters != whole.certain.get(off.id, {0: 0})[on.num_given]:
                yield index, f"{on.num_given_characters} characters are certain with {on.num_given} tokens"
            if on.num_given and not menu.wishes[index].recompute:
                if not np.isnan(on.logprobs[: on.num_given]).all():
                    yield index, "log-probabilities that were not computed are no NaN"
                on.logprobs[: on.num_given] = off.logprobs[: on.num_given]
                on.top_logprobs[: on.num_given] = off.top_logprobs[: on.num_given]
            elif on.finish_reason == "cancelled":  # before all of them were computed
                on.logprobs += off.logprobs[len(on.logprobs) : on.num_given]
                on.top_logprobs += off.top_logprobs[len(on.top_logprobs) : on.num_given]


def events(run: Run) -> Counter[str]:
    """Counts of what happened at the seams of a run."""
    made: Counter[str] = Counter()
    for on in (request for requests in run.requests for request in requests if request.num_given):
        p, given = on.params, on.num_given
        made["points"] += 1
        made["ended by given tokens"] += len(on.output_ids) == given and on.finish_reason in ("stop", "length")
        made["under a mask"] += p.logits_mask is not None
        made["with penalties"] += p.repetition_penalty != 1 or bool(p.frequency_penalty or p.presence_penalty)
        made["within min_tokens"] += p.min_tokens > given
        made["recomputed"] += on.computes_given
        made["recomputed and preempted"] += on.computes_given and on.num_preemptions > 0
        made["several samples"] += p.n > 1
        made["prefix hits"] += on.num_cached > 0
        made["preempted"] += on.num_preemptions > 0
        made["with drafts"] += on.num_drafted > 0
        made[f"{type(on.stop_reason).__name__} stops"] += on.finish_reason == "stop"
        made[f"temperature {p.temperature:g}"] += 1
    return made


def lots(whole: Whole, seed: int, count: int, size: int) -> list[Lot]:
    """Lots of `size` random wishes, in all companies and with drafts of all built-in sources in turn, and none."""
    rng, made = np.random.default_rng(seed), []
    sources = ["off", *built_in(whole.subject.model)]
    for i in range(count):
        source, company = sources[(seed + i) % len(sources)], list(COMPANIES)[(seed + i) % len(COMPANIES)]
        chosen = tuple(rng.choice(len(whole.wishes), min(size, len(whole.wishes)), replace=False).tolist())
        number = None if source == "off" else int(rng.integers(1, 9))
        made.append(Lot(source, number, company, chosen, seed * 1000 + i))
    return made
