"""Watch: digests of an engine's logits, states, pages and kept states, taken after each step.

Only rows of tokens that became part of an answer and computed positions have digests. Rows of wrong drafts, and memory
past the computed tokens, may hold anything.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.engine.cache.memory import Memory
from lockstep.engine.engine import Engine
from lockstep.engine.request import Request
from lockstep.engine.runner import Span
from lockstep.ops.attention.kv_cache import PAGE_TOKENS
from tests.promise.trace import positions


def digest(array: np.ndarray) -> bytes:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


@dataclass
class Seen:
    """Digests of one request.

    logits: of the rows that chose the tokens of its answer. states: {number of computed tokens: digest of the recurrent
    state}. pages: each time that its memory was taken back, the computed positions that it held, see `positions`.
    """

    logits: list[bytes] = field(default_factory=list)
    states: dict[int, bytes] = field(default_factory=dict)
    pages: list[dict[str, tuple[int, np.ndarray]]] = field(default_factory=list)


class Watch:
    """Hooks into the parts of an engine.

    seen: {id of a request: Seen}. blocks: {(group, name): digest of the page when it was named}. kept: {name: digest of
    the kept state}. faults: errors in words, which no run may have. events: counts. steps: of each step [(id of a
    request, position of its first token, number of its known tokens)].
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.seen, self.events = engine, {}, Counter()
        self.blocks: dict[tuple[int, bytes], bytes] = {}
        self.kept: dict[bytes, bytes] = {}
        self.faults: list[str] = []
        self.steps: list[list[tuple[int, int, int]]] = []
        self._memory = Memory(engine.runner.program, engine.runner.caches)
        self._pages = [np.zeros(num_bytes, np.uint8) for num_bytes in self._memory.page_bytes]
        self._state = np.zeros(self._memory.state_bytes, np.uint8)
        self._spans: list[tuple[Request, Span, int]] = []
        self._results: tuple[np.ndarray, ...] = ()
        self._stepped, self._strip = engine.runner.step, engine.scheduler.strip
        engine.runner.step, engine.scheduler.strip = self._run, self._leave
        self._watch_names()

    def _watch_names(self) -> None:
        scheduler = self.engine.scheduler
        states = scheduler.prefix.states if scheduler.prefix else None
        for group, allocator in enumerate(scheduler.pages.allocators):
            allocator.name = functools.partial(self._named, group, allocator.name)
        if states is not None:
            put = states.put

            def kept(block: bytes, fill: Any) -> None:
                put(block, fill)
                made = states.get(block)
                assert made is not None
                self._note("kept state", self.kept, block, digest(made))

            states.put = kept

    def _named(self, group: int, name: Callable[[int, bytes], None], page: int, block: bytes) -> None:
        name(page, block)
        self._memory.read_page(group, page, self._pages[group])
        self._note("block", self.blocks, (group, block), digest(self._pages[group]))

    def _note(self, what: str, known: dict[Any, bytes], name: Any, found: bytes) -> None:
        if known.setdefault(name, found) != found:
            self.faults.append(f"a {what} has other bytes than before")

    # ------------------------------------------------------------ steps

    def step(self) -> None:
        """Runs one step of the engine, and takes the digests."""
        self._spans = []
        self.engine.step()
        first = 0
        for request, span, num_before in self._spans:
            first = self._look(request, span, num_before, first)

    def _run(self, spans: Sequence[Span], clock: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        by_slot = {r.slot: r for r in self.engine.scheduler.running}
        self._spans = [(by_slot[span.slot], span, len(by_slot[span.slot].output_ids)) for span in spans]
        self.steps.append([(r.id, span.start, len(span.token_ids) - span.num_drafts) for r, span, _ in self._spans])
        self._results = self._stepped(spans, clock)
        return self._results

    def _look(self, request: Request, span: Span, num_before: int, first: int) -> int:
        """Takes the digests of a span, whose first sampled row is `first`; returns the row after its last."""
        seen = self.seen.setdefault(request.id, Seen())
        own = first + sum("given" in fields for fields in span.sampled.values())
        gained = len(request.output_ids) - num_before
        seen.logits += [digest(self._results[2][row]) for row in range(own, own + gained)]
        if span.num_drafts:
            self._count(request, span.num_drafts, gained - 1)
        if request.slot is not None:
            self._note_state(request)
            self._check_names(request)
        return first + len(span.sampled)

    def _count(self, request: Request, num_drafts: int, num_right: int) -> None:
        self.events["drafts"] += num_drafts
        self.events["right drafts"] += num_right
        if request.params.logits_mask is not None:
            self.events["drafts under a mask"] += num_drafts
            self.events["right drafts under a mask"] += num_right
        self.events[f"width {num_drafts + 1}"] += 1
        if num_right < num_drafts and request.finish_reason is None:
            self.events[f"rejected at {num_right}"] += 1

    def _check_names(self, request: Request) -> None:
        num_named = request.prefix.num_named
        if num_named * PAGE_TOKENS > request.num_computed:
            self.faults.append(f"{num_named} blocks named at {request.num_computed} computed tokens")

    def _note_state(self, request: Request) -> None:
        if self._memory.state_bytes:
            at = request.num_computed
            self._memory.read_state(request.running_slot, at, request.num_pending, self._state)
            states = self.seen.setdefault(request.id, Seen()).states
            self._note(f"state of request {request.id} at {at}", states, at, digest(self._state))

    def _leave(self, request: Request) -> None:
        """Called before a request's memory is taken back, since it ended, was cancelled or was preempted."""
        if request.num_computed:
            self._note_state(request)
            pages = positions(self.engine.runner, request.pages, request.num_computed)
            self.seen.setdefault(request.id, Seen()).pages.append(pages)
        self._strip(request)
