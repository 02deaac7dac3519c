"""Speculative decoding on against off: the same requests, beside other requests, on little memory, with drafts of every
kind.

A `Menu` has the answers to a set of wishes without drafts. A `Lot` is a part of the wishes, run with drafts.
`differences` lists everything that is not the same, bit for bit.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.request import Request
from lockstep.engine.speculation.drafts import MAX_DRAFTS, MODEL
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from tests.speculation.sources import BUILT_IN, KNOWING, built_in, plant
from tests.speculation.subjects import Subject, UsersMask
from tests.speculation.watch import Seen, Watch
from tests.speculation.wishes import Wish

AMPLE = dict(max_requests=16, kv_tokens=PAGE_TOKENS * 400, threads=1, state_every=64, prompt_state_from=0)
# EngineOptions of a Lot. The longest request takes 4 pages: answers have too little memory or much; steps are small or
# large
COMPANIES: dict[str, dict[str, Any]] = {
    "crowded": dict(max_requests=6, kv_tokens=PAGE_TOKENS * 7, max_step_tokens=100, threads=1, state_every=64),
    "roomy": dict(max_requests=8, kv_tokens=PAGE_TOKENS * 60, max_step_tokens=300, threads=1, state_every=128),
    "narrow": dict(max_requests=3, kv_tokens=PAGE_TOKENS * 13, max_step_tokens=17, threads=2, prompt_state_from=0),
    "tight": dict(max_requests=5, kv_tokens=PAGE_TOKENS * 12, max_step_tokens=4, threads=1, state_every=64),
    "disk": dict(max_requests=5, kv_tokens=PAGE_TOKENS * 9, max_step_tokens=64, threads=1, state_every=64),
}
ROOMY = ("crowded", "roomy", "disk")  # where the steps have room for many drafts
MOST_STEPS = 20_000


@dataclass
class Run:
    """Requests that ran, by wish and sample, and the Watch of their engine."""

    requests: list[list[Request]]
    watch: Watch


def serve(engine: Engine, wishes: list[Wish], seed: int | None, on_ask: Callable[[int, list[Request]], None]) -> Run:
    """Runs wishes to their ends. seed: of the random arrivals, cancels and preemptions; None: all arrive at once, and
    none is cancelled or preempted. on_ask: called with the index of a wish and its Requests."""
    watch, requests, rng = Watch(engine), [], np.random.default_rng(seed)
    for _ in range(MOST_STEPS):
        while len(requests) < len(wishes) and (seed is None or not engine.has_work or rng.random() < 0.6):
            requests.append(wishes[len(requests)].ask(engine))
            on_ask(len(requests) - 1, requests[-1])
        watch.step()
        if seed is not None:
            disturb(engine, [r for samples in requests for r in samples], rng)
        if len(requests) == len(wishes) and not engine.has_work:
            return Run(requests, watch)
    raise AssertionError(f"requests that never end (seed {seed})")


def disturb(engine: Engine, requests: list[Request], rng: np.random.Generator) -> None:
    """Cancels a random request now and then, and preempts one."""
    alive, running = [r for r in requests if r.finish_reason is None], engine.scheduler.running
    if alive and rng.random() < 0.02:
        engine.cancel(alive[rng.integers(len(alive))])
    if running and rng.random() < 0.03:
        engine.scheduler.preempt(running[rng.integers(len(running))])


@contextlib.contextmanager
def opened(subject: Subject, options: Mapping[str, Any]) -> Iterator[Engine]:
    """An engine of a subject, closed at the end."""
    made, detokenizer = EngineOptions(**options), subject.new_detokenizer
    draft_model = subject.draft_model if made.speculate == MODEL else None
    engine = Engine(subject.model, made, eos_ids=subject.eos_ids, new_detokenizer=detokenizer, draft_model=draft_model)
    try:
        yield engine
    finally:
        engine.close()


class Menu:
    """The answers to wishes without drafts, all together on enough memory."""

    def __init__(self, subject: Subject, wishes: list[Wish]) -> None:
        self.subject, self.wishes = subject, wishes
        with opened(subject, AMPLE) as engine:
            self.run = serve(engine, wishes, None, lambda index, requests: None)
        assert not self.run.watch.faults, self.run.watch.faults
        for samples in self.run.requests:
            assert not any(r.is_fault or r.finish_reason in (None, "cancelled") for r in samples)


@dataclass(frozen=True)
class Lot:
    """Wishes of a Menu, by index, and the way they run. source: of the drafts. num_drafts: of a request in a step;
    None: as many as pay. company: a name in COMPANIES. seed: see `serve`."""

    source: str
    num_drafts: int | None
    company: str
    indices: tuple[int, ...]
    seed: int

    def __str__(self) -> str:
        return f"{self.source}, {self.num_drafts} drafts, {self.company}, seed {self.seed}"


@dataclass
class Report:
    """Results of lots: differences in words, and counts of events."""

    differences: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)


def run_lot(menu: Menu, lot: Lot, folder: Path) -> Report:
    """Runs a lot with drafts and compares it with its Menu. folder: where the company "disk" keeps prefixes."""
    return compared(menu, lot, run_on(menu, lot, folder))


def run_on(menu: Menu, lot: Lot, folder: Path) -> Run:
    """Runs a lot's wishes on an engine of their own; with the source "off" there are no drafts."""
    answers: dict[int, list[int]] = {}
    wishes, rng = [menu.wishes[i] for i in lot.indices], np.random.default_rng(lot.seed)

    def on_ask(index: int, requests: list[Request]) -> None:
        for request, known in zip(requests, menu.run.requests[lot.indices[index]], strict=True):
            answers[request.id] = known.output_ids

    speculate = BUILT_IN[0] if lot.source in KNOWING else lot.source
    options = COMPANIES[lot.company] | dict(speculate=speculate, draft=lot.num_drafts)
    if lot.company == "disk":
        options |= dict(cache_dir=folder)
    with opened(menu.subject, options) as engine:
        if lot.source in KNOWING:
            source = KNOWING[lot.source](lambda r: answers[r.id], rng, menu.subject.vocab_size)
            plant(engine, source, lot.num_drafts)
        return serve(engine, wishes, lot.seed, on_ask)


def compared(menu: Menu, lot: Lot, run: Run) -> Report:
    """Compares a lot that ran with its Menu."""
    report = Report(events=run.watch.events + Counter(run.watch.engine.counts()))
    for source, counts in run.watch.engine.draft_counts().items():
        report.events[f"drafts from {source}"] += sum(counts.drafted)
    found, pages = [*run.watch.faults, *unlike(menu.run.watch, run.watch)], run.watch.engine.scheduler.pages
    if pages.num_free != pages.num_pages:
        found.append(f"{pages.num_pages - pages.num_free} pages are held by nobody")
    for index, requests in zip(lot.indices, run.requests, strict=True):
        found += unlike_calls(menu.run.requests[index], requests)
        for off, on in zip(menu.run.requests[index], requests, strict=True):
            seen = [watch.seen.get(r.id, Seen()) for watch, r in ((menu.run.watch, off), (run.watch, on))]
            found += [f"wish {index}: {what}" for what in differences(off, on, *seen)]
            report.events["requests"] += 1
            report.events[on.finish_reason or "no end"] += 1
            report.events["prefix hits"] += on.num_cached > 0
            report.events["preempted requests"] += on.num_preemptions > 0
            report.events["requests under a mask"] += on.params.logits_mask is not None
            report.events["drafts under a mask"] += on.num_drafted if on.params.logits_mask else 0
            report.events[f"{type(on.stop_reason).__name__} stops"] += on.finish_reason == "stop"
            report.events[f"temperature {on.params.temperature:g}"] += on.pool is None
    report.differences = [f"{lot}: {what}" for what in found]
    return report


def unlike(off: Watch, on: Watch) -> Iterator[str]:
    """Differences between named blocks and between kept states."""
    if not on.blocks.keys() <= off.blocks.keys():
        yield "a block that has a name with speculation only"
    for field_name in ("blocks", "kept"):
        one, two = getattr(off, field_name), getattr(on, field_name)
        if any(one[name] != two[name] for name in one.keys() & two.keys()):
            yield f"bytes of {field_name}"


def unlike_calls(off: list[Request], on: list[Request]) -> Iterator[str]:
    """Differences between the calls of the samples' logits_mask, if it is a plain function."""
    one, two = (samples[0].params.logits_mask for samples in (off, on))
    if isinstance(one, UsersMask) and isinstance(two, UsersMask):
        was_cancelled = any(r.finish_reason == "cancelled" for r in on)
        missing, added = (Counter(a.calls) - Counter(b.calls) for a, b in ((one, two), (two, one)))
        if added or (missing and not was_cancelled):
            yield f"calls of logits_mask: {sorted(one.calls)} without speculation, {sorted(two.calls)} with it"


def differences(off: Request, on: Request, off_seen: Seen, on_seen: Seen) -> Iterator[str]:
    """Differences between a request without drafts and the same with drafts, which may have been cancelled."""
    count = len(on.output_ids)
    for name in ("output_ids", "logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs"):
        one, two = getattr(off, name), getattr(on, name)
        if on.finish_reason == "cancelled" and "prompt" in name:
            one = one[: len(two)]
        elif on.finish_reason == "cancelled":
            one = one[:count]
        if one != two:
            yield f"{name}: {one} without speculation, {two} with it"
    ends = [(r.finish_reason, r.stop_reason, r.error, r.text) for r in (off, on)]
    if on.finish_reason == "cancelled":
        if not off.text.startswith(on.text):
            yield f"text: {off.text!r} without speculation, {on.text!r} with it"
    elif ends[0] != ends[1]:
        yield f"the end: {ends[0]} without speculation, {ends[1]} with it"
    if on.finish_reason == "embedded" and not np.array_equal(embedding(off), embedding(on)):
        yield "the embedding"
    if off_seen.logits[on.num_given : count] != on_seen.logits:
        yield "logits"
    yield from unlike_memory(off, off_seen, on_seen)


def embedding(request: Request) -> np.ndarray:
    """The embedding of a request that asked for one."""
    assert request.pool is not None
    return request.pool.embedding()


def unlike_memory(off: Request, off_seen: Seen, on_seen: Seen) -> Iterator[str]:
    """Differences between recurrent states, and between keys and values of computed positions."""
    for at, state in on_seen.states.items():
        if at >= len(off.prompt_ids) and at not in off_seen.states:
            yield f"a state after {at} tokens, with speculation only"
        elif off_seen.states.get(at, state) != state:
            yield f"the state after {at} tokens"
    for on_pages in on_seen.pages:
        for name, off_pages in off_seen.pages[-1].items():  # a Head's own caches are not compared
            if _unlike_positions(*off_pages, *on_pages[name]):
                yield f"{name}: keys or values"


def _unlike_positions(start: int, known: np.ndarray, first: int, rows: np.ndarray) -> bool:
    """Whether rows from position `first` on differ from the rows known from `start` on, at positions that both have, or
    go further."""
    low, high = max(start, first), min(start + len(known), first + len(rows))
    return first + len(rows) > start + len(known) or (
        low < high and bool((known[low - start : high - start] != rows[low - first : high - first]).any())
    )


def lots(menu: Menu, seed: int, size: int) -> list[Lot]:
    """Lots of every source and every number of drafts, each of `size` random wishes. There are lots with 15 drafts, of
    which one is wrong, for each place (with long answers, in roomy companies); lots with every other source and number
    of drafts in turn, in all companies; and lots with the built-in sources and as many drafts as pay."""
    rng = np.random.default_rng(seed)
    long = [i for i, samples in enumerate(menu.run.requests) if len(samples[0].output_ids) > MAX_DRAFTS]
    own = built_in(menu.subject.model)
    others = [*own, *(name for name in KNOWING if not name.startswith("wrong at"))]
    shift = int(rng.integers(len(others)))
    plan = [(f"wrong at {n}", MAX_DRAFTS, ROOMY[(n + shift) % len(ROOMY)], long) for n in range(MAX_DRAFTS)]
    turns = [(others[(i + shift) % len(others)], i + 1) for i in range(MAX_DRAFTS - 1)]
    for i, (source, number) in enumerate([*turns, *((source, None) for source in ("mostly right", *own))]):
        company = list(COMPANIES)[(i + i // len(COMPANIES) + shift) % len(COMPANIES)]
        plan.append((source, number, company, list(range(len(menu.wishes)))))
    made = []
    for i, (source, number, company, indices) in enumerate(plan):
        chosen = tuple(rng.choice(indices, min(size, len(indices)), replace=False).tolist())
        made.append(Lot(source, number, company, chosen, seed * 1000 + i))
    return made
