"""Drafts: guesses of the next tokens, computed in the same step as the token before them, and kept if they are right.

A draft changes nothing but the time. It takes tokens, sampled rows and pages of a step that are left over, so that
nobody waits, is preempted or loses a cached block for it. A draft is right if the model, with the noise of its position
and with what the request asks of its logits, chooses the same token. Of a wrong one nothing is left to undo: keys and
values past the computed tokens of a request are overwritten before anybody reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.engine.lookup import Lookup
from lockstep.engine.request import Request
from lockstep.engine.sampling import num_rows
from lockstep.engine.scheduler import Scheduler

MAX_DRAFTS = 15


@dataclass
class Spare:
    """What a step has left: tokens, and rows that sample."""

    tokens: int
    rows: int


Source = Callable[[Request, int], list[int]]  # (request, at most how many): guesses of its next tokens


def look_up(request: Request, most: int) -> list[int]:
    """What followed the same few tokens earlier in a request's prompt or answer."""
    if request.lookup is None:
        request.lookup = Lookup()
    request.lookup.extend(request.token_ids(len(request.lookup), request.num_tokens))
    return request.lookup.guess(most)


SOURCES: dict[str, Source | None] = {"off": None, "lookup": look_up}


class Drafter:
    """Gives the requests of a step their drafts.

    num_drafts: the most of one request in a step. eos_ids: the model's end tokens, after which nothing is drafted.
    """

    def __init__(self, scheduler: Scheduler, source: Source, num_drafts: int, eos_ids: frozenset[int]) -> None:
        self._scheduler, self._source, self._num_drafts, self._eos_ids = scheduler, source, num_drafts, eos_ids

    def spare(self, plan: list[tuple[Request, int]]) -> Spare:
        """What is left in a step of so many tokens of each request."""
        limits = self._scheduler.limits
        rows = sum(num_rows(request, count) for request, count in plan)
        return Spare(limits.max_step_tokens - sum(count for _, count in plan), limits.max_sampled - rows)

    def draft(self, request: Request, spare: Spare) -> list[int]:
        """Drafts of a request's next tokens, with pages to put them in; they are taken from what is spare.

        Only for a request that decodes, and whose logits_mask (a function of others', called once for each token of the
        answer) need not be asked about tokens that may not come.
        """
        p = request.params
        if request.num_left != 1 or request.pool is not None or p.logits_mask is not None:
            return []
        most = min(self._num_drafts, spare.tokens, spare.rows, p.max_tokens - len(request.output_ids) - 1)
        drafts = self._up_to_end(request, self._source(request, most)) if most > 0 else []
        drafts = drafts[: self._scheduler.lend(request, len(drafts))] if drafts else []
        spare.tokens, spare.rows = spare.tokens - len(drafts), spare.rows - len(drafts)
        request.num_drafted += len(drafts)
        return drafts

    def _up_to_end(self, request: Request, drafts: list[int]) -> list[int]:
        """The drafts before the first that would end the answer: nothing follows that one."""
        p = request.params
        ends = set(p.stop_token_ids) | (set() if p.ignore_eos else self._eos_ids)
        return drafts[: next((i for i, token in enumerate(drafts) if token in ends), len(drafts))]
