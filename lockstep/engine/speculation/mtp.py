"""Drafts by a model's own MTP (multi-token-prediction) head: which pairs it has of each request, and the hidden states
that it gets after each step.

The head has keys and values of its own, under the page ids of the model: position t holds the pair of token t and of
the model's hidden state at t - 1. So the content of a page depends on its tokens and those before them, and a request
that finds a page in the prefix cache finds the head's part of the page, too, if it was computed. Pairs may be missing:
the head then sees a request from the first page after which no pair is missing, and uses zeros for a hidden state that
is not known (before the first token, or at the end of a found prefix). That makes drafts worse, and nothing else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.cache.prefix import PrefixCache
from lockstep.engine.request import Request
from lockstep.engine.sampling import guessed
from lockstep.engine.speculation.mtp_runner import KEPT_PAIRS, MtpRunner, PairSpan
from lockstep.engine.speculation.step_costs import GUESS_GAIN, StepCosts
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

MOST_PAIRS = 8  # the most pairs of a request in a call whose time counts as the time of a guess


@dataclass
class HeadState:
    """What the head has of a request: the pairs from the first position of page number first_page up to position `end`,
    and the hidden states of the next pairs: first `missing` zeros, which are not stored, then those in `hidden`."""

    first_page: int
    end: int
    missing: int
    hidden: np.ndarray

    @property
    def next_end(self) -> int:
        """The position where its pairs will end after these hidden states are taken in."""
        return self.end + self.missing + len(self.hidden)


class MtpDrafts:
    """A `draft_head.Head`. group: the model's group of pages without a window, whose page ids the head uses. prefix:
    the PrefixCache, which names blocks; None: pages are never found again. eos_ids, vocab_size: the model's."""

    name = "mtp"

    def __init__(
        self,
        runner: MtpRunner,
        group: int,
        prefix: PrefixCache | None,
        eos_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self.runner, self._group, self._prefix = runner, group, prefix
        self._eos_ids, self._vocab_size = eos_ids, vocab_size
        self.costs = StepCosts(GUESS_GAIN, GUESS_GAIN)
        self.names: dict[int, bytes] = {}  # {page with all its pairs: the name of its block}
        self._waiting: list[Request] = []  # requests with many hidden states that are not taken in yet

    @property
    def may_rest(self) -> bool:
        """False while hidden states wait that the next step overwrites."""
        return not self._waiting

    def wants_hidden(self, request: Request) -> bool:
        """True, for every request."""
        return True

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """Takes in the hidden states of a request's tokens from position `start` on: float32 [n, D]. Up to KEPT_PAIRS
        are copied and wait until drafts are wanted; more of them are computed before the next step."""
        state = request.draft_state
        if not isinstance(state, HeadState) or state.next_end != start + 1:
            state = request.draft_state = self._new_state(request, start)
        if len(state.hidden):
            state.hidden = np.concatenate([state.hidden, hidden])
        else:
            state.hidden = hidden.copy() if len(hidden) <= KEPT_PAIRS else hidden
        if len(state.hidden) > KEPT_PAIRS:
            self._waiting.append(request)

    def _new_state(self, request: Request, start: int) -> HeadState:
        """The HeadState of a request whose first hidden state is that of position `start`."""
        page = start // PAGE_TOKENS
        state = HeadState(page, page * PAGE_TOKENS, start + 1 - page * PAGE_TOKENS, np.empty((0, 0), np.float32))
        if start % PAGE_TOKENS == 0:
            while state.first_page and self._has_pairs(request, state.first_page - 1):
                state.first_page -= 1
        return state

    def _has_pairs(self, request: Request, number: int) -> bool:
        """Whether all pairs of a request's page are computed."""
        name = self.names.get(request.pages[self._group].ids[number])
        return name is not None and name == request.prefix.block_names[number]

    def ready(self, request: Request, max_drafts: int) -> int:
        """`max_drafts`, if the head will have all pairs of a request's known tokens; else 0."""
        state = request.draft_state
        return max_drafts if isinstance(state, HeadState) and state.next_end == request.num_tokens else 0

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """{id of a request: its drafts}, of as many as wanted: [(request, number), ...]. One native call computes them,
        and all pairs of these requests and of those with many hidden states."""
        counts = {request: count for request, count in wanted if count}
        waiting = [r for r in dict.fromkeys([*counts, *self._waiting]) if r.slot is not None and r.draft_state]
        if len(waiting) > 1:
            waiting.sort(key=lambda request: -counts.get(request, 0))
        self._waiting = []
        spans = [(request, self._span(request, counts.get(request, 0))) for request in waiting]
        for request, span in spans:
            if not span.token_ids:
                self._copy_hidden(request)
        spans = [(request, span) for request, span in spans if span.token_ids]
        if not spans:
            return {}
        began = time.perf_counter()
        drafts = self.runner.run([span for _, span in spans])
        if counts and max(len(span.token_ids) for _, span in spans) <= MOST_PAIRS:
            self.costs.note(len(counts), (time.perf_counter() - began) / max(counts.values()))
        for request, span in spans:
            self._note_taken(request, span)
        return {request.id: tokens for (request, _), tokens in zip(spans, drafts, strict=True)}

    def is_behind(self, request: Request) -> bool:
        """False: a request that is behind is not ready, so that no guess of it is wanted."""
        return False

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more draft of each of num_requests requests takes; 0 before any was measured."""
        return self.costs.of(num_requests) if self.costs else 0.0

    def forget(self, request: Request) -> None:
        """Does nothing: the head's memory is the request's pages."""

    def _span(self, request: Request, depth: int) -> PairSpan:
        """The PairSpan of a request's next pairs, as far as it has pages, and of `depth` drafts after them."""
        state = request.draft_state
        assert isinstance(state, HeadState)
        first = state.first_page * PAGE_TOKENS
        ids = request.pages[self._group].ids
        end = min(state.next_end, len(ids) * PAGE_TOKENS)
        hidden = state.hidden[: max(0, end - state.end - state.missing)]
        sampling = guessed(request, self._eos_ids, self._vocab_size) if depth else None
        pages = everywhere(ids[state.first_page :])
        return PairSpan(request.token_ids(state.end, end), state.end - first, hidden, pages, depth, sampling)

    def _note_taken(self, request: Request, span: PairSpan) -> None:
        """Notes which pairs the head now has of a request, and which of its pages have all their pairs."""
        state = request.draft_state
        assert isinstance(state, HeadState)
        before, count, ids = state.end, len(span.token_ids), request.pages[self._group].ids
        state.end += count
        state.missing = max(0, state.missing - (count - len(span.hidden)))
        state.hidden = state.hidden[len(span.hidden) :]
        num_written = min(len(ids), pages_for(state.end + span.depth))  # pages; drafts write to them, too
        for number in range(before // PAGE_TOKENS, num_written):
            page = ids[number]
            self.names.pop(page, None)
            if self._prefix and (number + 1) * PAGE_TOKENS <= state.end:
                self.names[page] = self._prefix.names(request, number + 1)[number]
        if state.next_end > state.end:
            self._copy_hidden(request)

    def _copy_hidden(self, request: Request) -> None:
        """Copies hidden states for which there is no page yet, since the next step overwrites them."""
        assert isinstance(request.draft_state, HeadState)
        request.draft_state.hidden = request.draft_state.hidden.copy()
