"""Which tokens run in the next step: each request computes the tokens that it knows (its prompt and its answer so far)
but has not computed yet, under a budget of tokens per step. There is no prefill phase.

`schedule` works in this order. It admits waiting requests while slots and pages are free. It plans the decoding
requests (one known token left to compute) in order of rank: priority, the lowest number first, then arrival. Prompts
share the rest of the budget, the one with the fewest tokens left first, so that a short prompt does not wait for a long
one; but a quarter of it is kept for the prompt that is first in rank, so that a long one does not wait for ever. The
Engine computes the plan and reports each request to `computed`; `remove` frees the memory of a request that has ended.

A request is admitted when there is a free slot and a page for each 64 of its known tokens, with one page to spare for
each running request; it takes further pages as it grows. When a running request needs a page and none is free, the
running request of the lowest rank is preempted: it gives back its pages and its slot, waits again, and computes its
known tokens once more (less what the prefix cache still has). No request is preempted for a waiting one, whatever its
priority, but for one that was moved: another engine began it and is gone, and its reader waits for the next token. For
such requests there are spare slots, which others do not get; and where slots or pages lack, requests that have yet to
give their first token are preempted, those of the lowest rank first.

Layers with a window need no pages for keys before the window. For these layers a request takes pages step by step, for
as many tokens as leave the other running requests their pages, and gives back the pages that no later token sees. It is
admitted when such layers have the pages with which it can be computed token by token, beside those that running
requests have yet to take.
"""

import time
from bisect import insort
from collections.abc import Callable, Iterable

from lockstep.engine.cache.pages import PageGroup, PagePool
from lockstep.engine.cache.prefix import KnownPrefix, PrefixCache
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits
from lockstep.ops.attention.kv_cache import PAGE_TOKENS

RESERVED_PART = 4  # of the budget of prompts, what is kept for the first in rank: a quarter, see study 20


def rank(request: Request) -> tuple[int, int]:
    """A request's place in the order: the lowest goes first."""
    return request.priority, request.id


class Scheduler:
    """Waiting and running requests in order of rank, their pages and slots.

    prefix: a function that makes the PrefixCache of the PagePool; None: every request computes its whole prompt.
    """

    def __init__(self, limits: Limits, prefix: Callable[[PagePool], PrefixCache] | None = None) -> None:
        self.limits, self.pages = limits, PagePool(limits.groups or [PageGroup(limits.num_pages)])
        self.prefix = prefix(self.pages) if prefix else None
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preempted = 0
        self.on_admitted: Callable[[Request], object] = lambda request: None  # called when one gets pages at first
        self.free_slots = list(range(limits.max_requests - 1, -1, -1))

    @property
    def most_tokens(self) -> int:
        """The most tokens of a request for which there are pages."""
        return self.limits.num_pages * PAGE_TOKENS

    def check(self, request: Request) -> None:
        """ValueError for a request that could never run."""
        if any(group.needed(request.max_num_tokens) > group.num_pages for group in self.pages.groups):
            raise ValueError(
                f"prompt of {len(request.prompt_ids)} tokens and max_tokens {request.params.max_tokens}: "
                f"the KV cache holds {self.most_tokens} tokens in all"
            )

    def add(self, request: Request) -> None:
        """Queues a request; ValueError if it could never run."""
        self.check(request)
        insort(self.waiting, request, key=rank)

    def remove(self, request: Request) -> None:
        """Ends a waiting or running request; its pages and slot are free at once."""
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        """Takes a request out of the running ones, and all its memory back."""
        self.running.remove(request)
        if self.prefix:
            self.prefix.leave(request)
        self.strip(request)

    def strip(self, request: Request) -> None:
        """Takes back a request's pages and slot; none of its tokens counts as computed any more."""
        self.pages.give_back(request.pages)
        self.free_slots.append(request.running_slot)
        request.pages, request.slot, request.num_computed, request.prefix.num_named = [], None, 0, 0
        request.num_pending, request.num_lent, request.draft_state = 0, 0, None

    def computed(self, request: Request, num_tokens: int) -> None:
        """Notes that a step computed `num_tokens` more tokens of a request: names the blocks that are full now, and
        gives back the pages behind the windows."""
        request.num_computed += num_tokens
        if self.prefix and request.num_computed // PAGE_TOKENS > request.prefix.num_named:
            self.prefix.computed(request)
        if self.pages.has_windows:
            stops = self.prefix.stops(request) if self.prefix else ()
            self.pages.drop_unseen(request.pages, request.num_computed, stops)

    def schedule(self) -> list[tuple[Request, int]]:
        """[(request, number of its tokens to compute), ...] for the next step."""
        if self.waiting:
            self._admit()
        plan, budget = [], self.limits.max_step_tokens
        for request in [r for r in self.running if r.num_left == 1]:
            if budget and request.slot is not None and self._grow(request, 1):
                plan.append((request, 1))
                budget -= 1
        prompts = [r for r in self.running if r.num_left > 1]
        if not prompts:
            return plan
        plan += self._prompts(prompts, budget)
        return [(request, num_tokens) for request, num_tokens in plan if request.slot is not None]

    def _prompts(self, prompts: list[Request], budget: int) -> list[tuple[Request, int]]:
        """Deals the budget to prompts, the one with the fewest tokens left first; a part is reserved for the first in
        rank."""
        plan, first = [], prompts[0]
        reserved = self._most(first, -(-budget // RESERVED_PART))
        for request in sorted(prompts, key=lambda r: (r.priority, r.num_left, r.id)):
            reserved = 0 if request is first else reserved
            count = self._most(request, budget - reserved)
            if count and request.slot is not None:
                count = self._grow(request, count)
            if count and request.slot is not None:
                plan.append((request, count))
                budget -= count
        return plan

    def _most(self, request: Request, budget: int) -> int:
        """How many tokens a request may compute in a step: up to the budget, and up to the next position at which the
        prefix cache keeps its recurrent state."""
        num_tokens = min(request.num_left, budget)
        return self.prefix.cut(request, num_tokens) if self.prefix else num_tokens

    def counts(self) -> dict[str, int]:
        """Counts of events so far, and of requests and pages now: {name: number}."""
        pages = self.pages
        counts = dict(
            running=len(self.running),
            waiting=len(self.waiting),
            preempted=self.num_preempted,
            pages=pages.num_pages,
            pages_free=pages.num_free - pages.num_idle,
            pages_idle=pages.num_idle,
            pages_evicted=pages.num_evicted,
        )
        return counts | (self.prefix.report() if self.prefix else {})

    # ------------------------------------------------------------ memory

    def _admit(self) -> None:
        """Places waiting requests in order of rank. None overtakes a request that waits for memory; a request whose
        prefix a running one is computing is passed over."""
        index = 0
        while index < len(self.waiting):
            request = self.waiting[index]
            if not self._has_slot(request):
                if not self._make_way(request):
                    return
            elif self.prefix and self.prefix.is_being_computed(request):
                index += 1
            elif self._place(request):
                del self.waiting[index]
                insort(self.running, request, key=rank)
            elif not self._make_way(request):
                return

    def _has_slot(self, request: Request) -> bool:
        return len(self.free_slots) > (0 if request.is_moved else self.limits.num_spare)

    def _make_way(self, request: Request) -> bool:
        """Preempts, for a request that was moved, the last running one after it in rank that has yet to give a token;
        False if there is none."""
        if not request.is_moved:
            return False
        young = (r for r in reversed(self.running) if not r.is_moved and len(r.output_ids) == r.num_given)
        last = next(young, None)
        if last is None or rank(last) < rank(request):
            return False
        self.preempt(last)
        return True

    def _place(self, request: Request) -> bool:
        """Gives a request its slot and pages for all its known tokens; False, and nothing changed, if there are too
        few."""
        known = self.prefix.find(request) if self.prefix else None
        if not self._has_room(request, known):
            return False
        request.slot, request.pages = self.free_slots.pop(), self.pages.none()
        if self.prefix and known:
            self.prefix.attach(request, known)
        if not self.pages.take_all(request.pages, request.num_tokens):  # a part that was found on disk is damaged
            self.strip(request)
            return False
        if self.prefix:
            self.prefix.enter(request)
        if request.admitted is None:
            request.admitted = time.monotonic()
            self.on_admitted(request)
        return True

    def _has_room(self, request: Request, known: KnownPrefix | None) -> bool:
        """Whether there are pages for a request, of which the prefix cache found some."""
        for number, (group, allocator) in enumerate(zip(self.pages.groups, self.pages.allocators, strict=True)):
            num_there = allocator.num_free + (known.num_held[number] if known else 0)
            num_there -= self._num_lacking(number, self.running)
            if num_there - group.needed(request.num_tokens) < len(self.running):
                return False
        return True

    def _num_lacking(self, number: int, requests: Iterable[Request]) -> int:
        """How many pages of a group with a window running requests have yet to take before they can be computed token
        by token; 0 in a group without a window, where a request takes the pages of its known tokens when it is
        admitted."""
        group = self.pages.groups[number]
        if not group.window:
            return 0
        return sum(max(0, group.needed(r.num_tokens) - len(r.pages[number].ids)) for r in requests)

    def _grow(self, request: Request, num_tokens: int) -> int:
        """Takes pages for up to `num_tokens` more tokens of a request, and preempts others for the first of them;
        returns for how many tokens there are pages: 0 if the request itself had to be preempted."""
        if num_tokens > 1:  # as many as leave the other running requests their pages
            others = [r for r in self.running if r is not request]
            reserved = [self._num_lacking(number, others) for number in range(len(self.pages.groups))]
            if num_granted := self.pages.extend(request.pages, request.num_computed, num_tokens, reserved):
                return num_granted
        while not self.pages.extend(request.pages, request.num_computed, 1):
            last = self.running[-1]
            self.preempt(last)
            if last is request:
                return 0
        return 1

    def lend(self, request: Request, num_tokens: int) -> int:
        """Lends a request blank pages for up to `num_tokens` drafts after its next token, until `settle`; returns for
        how many drafts there is room. No cached block is evicted for drafts."""
        num_tokens = self.pages.lend(request.pages, request.num_computed + 1, num_tokens)
        request.num_lent = sum(held.num_lent for held in request.pages)
        return num_tokens

    def settle(self, request: Request, num_next: int = 0) -> None:
        """Takes back the pages that were lent to a running request, but for those of its computed tokens and of the
        num_next tokens after them."""
        self.pages.settle(request.pages, request.num_computed + num_next)
        request.num_lent = 0

    def preempt(self, request: Request) -> None:
        """Takes a running request's memory away; it waits again, and keeps the tokens of its answer."""
        self._release(request)
        request.num_preemptions += 1
        self.num_preempted += 1
        insort(self.waiting, request, key=rank)
