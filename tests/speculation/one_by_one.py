"""Requests that run one after another, so that every step has the same requests with drafts and without: then the
prefix cache is the same, too.

Both find the same tokens of every prompt, keep the same blocks, states and files on disk, and have the same counts, but
for those of drafts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.engine.engine import Engine
from lockstep.engine.request import Request
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from tests.speculation.proof import opened
from tests.speculation.sources import BUILT_IN, KNOWING, plant
from tests.speculation.subjects import Subject
from tests.speculation.watch import Watch
from tests.speculation.wishes import Wish

# the longest turn takes 6 pages, so that blocks and states are evicted; all entries on disk are kept
OPTIONS = dict(max_requests=2, kv_tokens=PAGE_TOKENS * 8, threads=1, state_every=128, prompt_state_from=0)
NUM_STATES = 5
DRAFT_COUNTS = ("drafts", "accepted_drafts")


@dataclass
class OneByOne:
    """found: of each request its answer and the number of its cached tokens. kept: {name: digest} of blocks and of
    states, for each engine. counts: of each engine at its end. files: {name: bytes} in the folder of the disk store.
    num_right: right drafts."""

    found: list[tuple[Any, ...]]
    kept: list[dict[bytes, bytes]]
    counts: list[dict[str, int]]
    files: dict[str, bytes]
    num_right: int


def one_by_one(
    subject: Subject,
    asked: list[Wish],
    folder: Path,
    source: str = "off",
    num_drafts: int | None = None,
    answers: Callable[[int], list[int]] = lambda index: [],
) -> OneByOne:
    """Runs two engines, the second of which finds on disk what the first kept. Each runs one sample of every wish, and
    after it a second turn that goes on from its answer. answers: gives a source the answer of the turn with an
    index."""
    made = OneByOne([], [], [], {}, 0)
    asked = [replace(wish, params=replace(wish.params, n=1)) for wish in asked]
    speculate = source if source in ("off", *BUILT_IN) else BUILT_IN[0]
    options = OPTIONS | dict(state_bytes=NUM_STATES * max(1, subject.state_bytes), cache_dir=folder)
    for _ in range(2):
        with opened(subject, options | dict(speculate=speculate, draft=num_drafts)) as engine:
            if source in KNOWING:
                knows = lambda request: answers(len(made.found))
                plant(engine, KNOWING[source](knows, np.random.default_rng(1), subject.vocab_size), num_drafts)
            _all_turns(engine, asked, made)
    made.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return made


def _all_turns(engine: Engine, asked: list[Wish], made: OneByOne) -> None:
    watch, prefix = Watch(engine), engine.scheduler.prefix
    for wish in asked:
        first = _turn(watch, wish)
        made.found.append(answered(first))
        second = _turn(watch, replace(wish, prompt_ids=wish.prompt_ids + first.output_ids + wish.prompt_ids[:3]))
        made.found.append(answered(second))
    assert not watch.faults, watch.faults
    assert prefix is not None and prefix.disk is not None
    prefix.disk.flush()
    counts = engine.counts()
    made.num_right += counts["accepted_drafts"]
    made.counts.append({name: count for name, count in counts.items() if name not in DRAFT_COUNTS})
    made.kept += [watch.blocks, watch.kept]


def _turn(watch: Watch, wish: Wish) -> Request:
    [request] = wish.ask(watch.engine)
    while watch.engine.has_work:
        watch.step()
    return request


def answered(r: Request) -> tuple[Any, ...]:
    """The whole answer of a request, and the number of its cached tokens."""
    reports = r.logprobs, r.top_logprobs, r.prompt_logprobs, r.prompt_top_logprobs
    return r.output_ids, *reports, r.text, r.finish_reason, r.stop_reason, r.num_cached
