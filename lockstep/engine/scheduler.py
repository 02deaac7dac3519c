"""Which tokens run in the next step. One rule: what is computed chases what is known, under a budget of tokens.

Requests are ranked by priority (the lowest number first), then by arrival. Those that have one token left (they decode)
go first, in order of rank. Prompts fill the rest of the budget, those with the least left first, so that a short prompt
does not wait for a long one; but half of it is kept for the first in rank, so that a long one does not wait for ever.

A request is admitted when a slot is free and pages for all its known tokens, with a page to spare for each running
request; it takes further pages as it grows. Where there are none, the running request of the lowest rank is preempted:
it gives all back, waits again, and computes its known tokens once more (less what the prefix cache still has). Nobody
is stopped for one that waits, whatever its priority.

Layers with a window need no pages for what lies before it. Of those a request takes pages with each step, for as many
of its tokens as others can spare pages for, and gives back what no later token sees. It is admitted when there are as
many as it needs to go on token by token, beside those that running requests have yet to take.
"""

from bisect import insort
from collections.abc import Callable, Iterable

from lockstep.engine.cache.pages import PageGroup, PagePool
from lockstep.engine.cache.prefix import Found, PrefixCache
from lockstep.engine.request import Request
from lockstep.engine.runner import Limits
from lockstep.ops.attention.kv_cache import PAGE_TOKENS


def rank(request: Request) -> tuple[int, int]:
    """Who goes first: the lower."""
    return request.priority, request.id


class Scheduler:
    """Waiting and running requests in order of rank, their pages and slots.

    prefix: makes the PrefixCache of these pages (a function of the PagePool), or None: every request starts cold.
    """

    def __init__(self, limits: Limits, prefix: Callable[[PagePool], PrefixCache] | None = None) -> None:
        self.limits, self.pages = limits, PagePool(limits.groups or [PageGroup(limits.num_pages)])
        self.prefix = prefix(self.pages) if prefix else None
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preempted = 0
        self.free_slots = list(range(limits.max_requests - 1, -1, -1))

    def check(self, request: Request) -> None:
        """ValueError for a request that could never run."""
        if any(group.needed(request.max_num_tokens) > group.num_pages for group in self.pages.groups):
            raise ValueError(
                f"prompt of {len(request.prompt_ids)} tokens and max_tokens {request.params.max_tokens}: "
                f"the KV cache holds {self.limits.num_pages * PAGE_TOKENS} tokens in all"
            )

    def add(self, request: Request) -> None:
        """Queues a request; ValueError if it could never run."""
        self.check(request)
        insort(self.waiting, request, key=rank)

    def remove(self, request: Request) -> None:
        """Ends a request, wherever it is; its pages and slot are free at once."""
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        if self.prefix:
            self.prefix.leave(request)
        self.strip(request)

    def strip(self, request: Request) -> None:
        """Takes back a request's pages and slot; what was computed for it is gone."""
        self.pages.give_back(request.pages)
        self.free_slots.append(request.running_slot)
        request.pages, request.slot, request.num_computed, request.num_named = [], None, 0, 0
        request.num_pending, request.num_lent, request.draft_state = 0, 0, None

    def computed(self, request: Request, count: int) -> None:
        """Notes that a step computed `count` more tokens of a request."""
        request.num_computed += count
        if self.prefix and request.num_computed // PAGE_TOKENS > request.num_named:
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
        return [(request, count) for request, count in plan if request.slot is not None]

    def _prompts(self, prompts: list[Request], budget: int) -> list[tuple[Request, int]]:
        """Deals the budget to prompts, the one with the least left first; half is kept for the first in rank."""
        plan, first = [], prompts[0]
        kept = self._most(first, -(-budget // 2))
        for request in sorted(prompts, key=lambda r: (r.priority, r.num_left, r.id)):
            kept = 0 if request is first else kept
            count = self._most(request, budget - kept)
            if count and request.slot is not None:
                count = self._grow(request, count)
            if count and request.slot is not None:
                plan.append((request, count))
                budget -= count
        return plan

    def _most(self, request: Request, budget: int) -> int:
        """Tokens that a request may compute in a step: up to the budget, and to where its state is to be kept."""
        count = min(request.num_left, budget)
        return self.prefix.cut(request, count) if self.prefix else count

    # ------------------------------------------------------------ memory

    def _admit(self) -> None:
        """Places waiting requests in order of rank; nobody overtakes one who waits for memory."""
        index = 0
        while index < len(self.waiting) and self.free_slots:
            request = self.waiting[index]
            if self.prefix and self.prefix.is_being_computed(request):
                index += 1
            elif self._place(request):
                del self.waiting[index]
                insort(self.running, request, key=rank)
            else:
                return

    def _place(self, request: Request) -> bool:
        """Gives a request its slot and pages for all that is known; False if there are too few, and nothing changed."""
        found = self.prefix.find(request) if self.prefix else None
        if not self._has_room(request, found):
            return False
        request.slot, request.pages = self.free_slots.pop(), self.pages.none()
        if self.prefix and found:
            self.prefix.attach(request, found)
        if not self.pages.take_all(request.pages, request.num_tokens):  # what was found turned out to be damaged
            self.strip(request)
            return False
        if self.prefix:
            self.prefix.enter(request)
        return True

    def _has_room(self, request: Request, found: Found | None) -> bool:
        """Whether there are pages for a request, of which the prefix cache found a part."""
        for number, (group, allocator) in enumerate(zip(self.pages.groups, self.pages.allocators, strict=True)):
            there = allocator.num_free + (found.num_held[number] if found else 0)
            there -= self._num_lacking(number, self.running)
            if there - group.needed(request.num_tokens) < len(self.running):
                return False
        return True

    def _num_lacking(self, number: int, requests: Iterable[Request]) -> int:
        """How many pages of a group running requests have yet to take, to go on token by token. Of layers that see all
        keys they take them at once, and one when they need it."""
        group = self.pages.groups[number]
        if not group.window:
            return 0
        return sum(max(0, group.needed(r.num_tokens) - len(r.pages[number].ids)) for r in requests)

    def _grow(self, request: Request, count: int) -> int:
        """Pages for up to `count` more tokens of a request; for how many there are. None are there if it was the one to
        be preempted for the first of them."""
        if count > 1:  # as many as others can spare
            others = [r for r in self.running if r is not request]
            kept = [self._num_lacking(number, others) for number in range(len(self.pages.groups))]
            if found := self.pages.extend(request.pages, request.num_computed, count, kept):
                return found
        while not self.pages.extend(request.pages, request.num_computed, 1):
            last = self.running[-1]
            self.preempt(last)
            if last is request:
                return 0
        return 1

    def lend(self, request: Request, count: int) -> int:
        """Pages for up to `count` drafts after a request's next token, of those that nobody uses and that hold nothing;
        for how many there is room. They are lent until `settle`."""
        count = self.pages.lend(request.pages, request.num_computed + 1, count)
        request.num_lent = sum(held.num_lent for held in request.pages)
        return count

    def settle(self, request: Request, num_next: int = 0) -> None:
        """Takes back what was lent to a running request and holds no computed token, nor one of the next so many."""
        self.pages.settle(request.pages, request.num_computed + num_next)
        request.num_lent = 0

    def preempt(self, request: Request) -> None:
        """Takes a running request's memory away; it waits again, with the tokens that it has."""
        self._release(request)
        request.num_preemptions += 1
        self.num_preempted += 1
        insort(self.waiting, request, key=rank)
