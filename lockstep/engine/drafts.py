"""Drafts: guesses of the next tokens, computed in the same step as the token before them, and kept if they are right.

A draft changes nothing but the time. It takes tokens, sampled rows and pages of a step that are left over, so that
nobody waits, is preempted or loses a cached block for it. A draft is right if the model, with the noise of its position
and with what the request asks of its logits, chooses the same token. Of a wrong one nothing is left to undo: keys and
values past the computed tokens of a request are overwritten before anybody reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lockstep.engine.draft_width import PROBE_EVERY, Acceptance, StepCosts, best_width
from lockstep.engine.lookup import Lookup
from lockstep.engine.request import Request
from lockstep.engine.sampling import num_rows
from lockstep.engine.scheduler import Scheduler

MAX_DRAFTS, MOST_BY_ITSELF = 15, 7  # of a request in a step: that may be asked for; where the width follows what pays


@dataclass
class Spare:
    """What a step has left: tokens, and rows that sample; and how many rows and new tokens it has already."""

    tokens: int
    rows: int
    num_rows: int
    num_new: float


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

    num_drafts: of one request in a step; None: as many as pay. eos_ids: the model's end tokens, after which nothing is
    drafted.
    """

    def __init__(self, scheduler: Scheduler, source: Source, num_drafts: int | None, eos_ids: frozenset[int]) -> None:
        self._scheduler, self._source, self._eos_ids = scheduler, source, eos_ids
        self._is_fixed, self._num_drafts = num_drafts is not None, num_drafts or MOST_BY_ITSELF
        self._acceptance, self._costs = Acceptance(self._num_drafts), StepCosts()

    def spare(self, plan: list[tuple[Request, int]]) -> Spare:
        """What is left in a step of so many tokens of each request."""
        limits = self._scheduler.limits
        sampled = sum(num_rows(request, count) for request, count in plan)
        tokens = sum(count for _, count in plan)
        decodes = tokens == len(plan)  # a prompt's step costs what it costs: drafts are weighed as if it were not there
        rows = tokens if decodes else 1
        return Spare(limits.max_step_tokens - tokens, limits.max_sampled - sampled, rows, rows)

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
        drafts = drafts[: self._width(request, len(drafts), spare)]
        drafts = drafts[: self._scheduler.lend(request, len(drafts))] if drafts else []
        spare.tokens, spare.rows = spare.tokens - len(drafts), spare.rows - len(drafts)
        spare.num_rows += len(drafts)
        request.num_drafted += len(drafts)
        return drafts

    def _width(self, request: Request, most: int, spare: Spare) -> int:
        """How many of so many drafts are worth their rows."""
        if self._is_fixed or not most:
            return most
        if request.acceptance is None:
            request.acceptance = Acceptance(self._num_drafts, self._acceptance)
        seen = request.acceptance
        width = best_width(seen.expected(), most, self._costs, spare.num_rows, spare.num_new)
        seen.num_without = 0 if width else seen.num_without + 1
        if seen.num_without == PROBE_EVERY:
            seen.num_without, width = 0, 1
        spare.num_new += seen.expected()[width]
        return width

    def note(self, request: Request, num_drafts: int, num_right: int) -> None:
        """Takes in how many of a request's drafts were right."""
        self._acceptance.note(num_drafts, num_right)
        if request.acceptance is not None:
            request.acceptance.note(num_drafts, num_right)

    def time(self, counts: list[int], num_drafts: int, seconds: float) -> None:
        """Takes in how long a step took that computed so many tokens of each request, and so many drafts in all."""
        if max(counts) == 1:
            self._costs.note(len(counts) + num_drafts, seconds)

    def _up_to_end(self, request: Request, drafts: list[int]) -> list[int]:
        """The drafts before the first that would end the answer: nothing follows that one."""
        p = request.params
        ends = set(p.stop_token_ids) | (set() if p.ignore_eos else self._eos_ids)
        return drafts[: next((i for i, token in enumerate(drafts) if token in ends), len(drafts))]
