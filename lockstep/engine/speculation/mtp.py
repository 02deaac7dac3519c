"""Drafts by a model's own MTP head: what it has of each request, and what it is given after each step.

The head has keys and values of its own, on the pages of the model's: at position t lies the pair of token t and of the
model's hidden state at t - 1. So what a page holds depends on its tokens and those before them, and whoever finds a
page in the prefix cache finds the head's part of it, too, if there is one. Pairs may be missing: the head then knows a
request from the first page on from which none is, and a hidden state that is not known (before the first token, or
where a found prefix ends) counts as zeros. That makes drafts worse, and nothing else.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.cache.prefix import PrefixCache
from lockstep.engine.request import Request
from lockstep.engine.sampling import guessed
from lockstep.engine.speculation.mtp_runner import KEPT_PAIRS, Chase, MtpRunner
from lockstep.engine.speculation.step_costs import GUESS_GAIN, StepCosts
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

MOST_PAIRS = 8  # of a request that a guess takes in while its time says what a guess takes


@dataclass
class Known:
    """What the head has of a request: pairs from the first position of page number `first_page` up to `end`, and the
    hidden states of the pairs that come next, of which the first `missing` are zeros that are not stored."""

    first_page: int
    end: int
    missing: int
    hidden: np.ndarray

    @property
    def next_end(self) -> int:
        """Where its pairs will end once it has taken in those states."""
        return self.end + self.missing + len(self.hidden)


class MtpDrafts:
    """A `draft_head.Head`. group: of pages of the model, that which keeps all, on whose pages the head lies. prefix:
    where names of pages come from; None: nobody finds pages. eos_ids, vocab_size: the model's."""

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
        self.names: dict[int, bytes] = {}  # by page whose pairs are all there: the name of its block
        self._waiting: list[Request] = []  # with many hidden states that have not been taken in

    @property
    def may_rest(self) -> bool:
        """Not while there are hidden states that the next step overwrites."""
        return not self._waiting

    def wants_hidden(self, request: Request) -> bool:
        """Whether a step is to give the hidden states of a request's tokens."""
        return True

    def observe(self, request: Request, start: int, hidden: np.ndarray) -> None:
        """Takes in the hidden states of a request's tokens from position `start` on: float32 [n, D]. Few are copied
        and wait until drafts are wanted, many are read before the next step."""
        known = request.draft_state
        if not isinstance(known, Known) or known.next_end != start + 1:
            known = request.draft_state = self._begun(request, start)
        if len(known.hidden):
            known.hidden = np.concatenate([known.hidden, hidden])
        else:
            known.hidden = hidden.copy() if len(hidden) <= KEPT_PAIRS else hidden
        if len(known.hidden) > KEPT_PAIRS:
            self._waiting.append(request)

    def _begun(self, request: Request, start: int) -> Known:
        """What the head has of a request of which it gets states from position `start` on."""
        page = start // PAGE_TOKENS
        known = Known(page, page * PAGE_TOKENS, start + 1 - page * PAGE_TOKENS, np.empty((0, 0), np.float32))
        if start % PAGE_TOKENS == 0:
            while known.first_page and self._has(request, known.first_page - 1):
                known.first_page -= 1
        return known

    def _has(self, request: Request, number: int) -> bool:
        """Whether all pairs of a request's page are there."""
        name = self.names.get(request.pages[self._group].ids[number])
        return name is not None and name == request.prefix.block_names[number]

    def ready(self, request: Request, most: int) -> int:
        """How many drafts a request could have, up to `most`."""
        known = request.draft_state
        return most if isinstance(known, Known) and known.next_end == request.num_tokens else 0

    def guess(self, wanted: Sequence[tuple[Request, int]], num_planned: int) -> dict[int, list[int]]:
        """{id of a request: so many drafts of it}, all in one native call, in which all of their states that wait
        are taken in, and those of others that are many."""
        counts = {request: count for request, count in wanted if count}
        waiting = [r for r in dict.fromkeys([*counts, *self._waiting]) if r.slot is not None and r.draft_state]
        if len(waiting) > 1:
            waiting.sort(key=lambda request: -counts.get(request, 0))
        self._waiting = []
        chases = [(request, self._chase(request, counts.get(request, 0))) for request in waiting]
        for request, chase in chases:
            if not chase.token_ids:
                self._keep(request)
        chases = [(request, chase) for request, chase in chases if chase.token_ids]
        if not chases:
            return {}
        began = time.perf_counter()
        drafts = self.runner.run([chase for _, chase in chases])
        if counts and max(len(chase.token_ids) for _, chase in chases) <= MOST_PAIRS:
            self.costs.note(len(counts), (time.perf_counter() - began) / max(counts.values()))
        for request, chase in chases:
            self._taken_in(request, chase)
        return {request.id: found for (request, _), found in zip(chases, drafts, strict=True)}

    def is_behind(self, request: Request) -> bool:
        """Who is not ready is not asked for."""
        return False

    def seconds(self, num_requests: int) -> float:
        """Seconds that one more draft of each of so many requests takes; 0 before any was measured."""
        return self.costs.of(num_requests) if self.costs else 0.0

    def forget(self, request: Request) -> None:
        """Nothing is held beyond a request's pages."""

    def _chase(self, request: Request, depth: int) -> Chase:
        """The pairs of a request that there are pages for."""
        known = request.draft_state
        assert isinstance(known, Known)
        first = known.first_page * PAGE_TOKENS
        ids = request.pages[self._group].ids
        end = min(known.next_end, len(ids) * PAGE_TOKENS)
        hidden = known.hidden[: max(0, end - known.end - known.missing)]
        sampling = guessed(request, self._eos_ids, self._vocab_size) if depth else None
        pages = everywhere(ids[known.first_page :])
        return Chase(request.token_ids(known.end, end), known.end - first, hidden, pages, depth, sampling)

    def _taken_in(self, request: Request, chase: Chase) -> None:
        """Notes what the head now has of a request, and which pages are whole."""
        known = request.draft_state
        assert isinstance(known, Known)
        before, count, ids = known.end, len(chase.token_ids), request.pages[self._group].ids
        known.end += count
        known.missing = max(0, known.missing - (count - len(chase.hidden)))
        known.hidden = known.hidden[len(chase.hidden) :]
        written = min(len(ids), pages_for(known.end + chase.depth))  # pages, by drafts, too
        for number in range(before // PAGE_TOKENS, written):
            page = ids[number]
            self.names.pop(page, None)
            if self._prefix and (number + 1) * PAGE_TOKENS <= known.end:
                self.names[page] = self._prefix.names(request, number + 1)[number]
        if known.next_end > known.end:
            self._keep(request)

    def _keep(self, request: Request) -> None:
        """Keeps hidden states for which there is no page yet beyond the step that made them."""
        assert isinstance(request.draft_state, Known)
        request.draft_state.hidden = request.draft_state.hidden.copy()
