"""Which tokens run in the next step. One rule: what is computed chases what is known, under a budget of tokens.

Requests that have one token left (they decode) go first; the rest of the budget is filled with the oldest requests'
prompts, in pieces as large as fit. A request is admitted when a slot and all the pages it can ever need are free.
"""
from collections import deque

from lockstep.engine.pages import PageAllocator
from lockstep.ops.kv_cache import PAGE_TOKENS


class Scheduler:
    """Waiting and running requests, their pages and slots."""

    def __init__(self, limits):
        self.limits, self.pages = limits, PageAllocator(limits.num_pages)
        self.waiting, self.running = deque(), []
        self._slots = list(range(limits.max_requests - 1, -1, -1))

    def add(self, request):
        """Queues a request; ValueError if it could never run."""
        needed = -(-request.max_num_tokens // PAGE_TOKENS)
        if needed > self.limits.num_pages:
            raise ValueError(f"prompt of {len(request.prompt_ids)} tokens and max_tokens {request.params.max_tokens}: "
                             f"the KV cache holds {self.limits.num_pages * PAGE_TOKENS} tokens in all")
        self.waiting.append(request)

    def remove(self, request):
        """Ends a request, wherever it is; its pages and slot are free at once."""
        if request.slot is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.pages.give_back(request.pages)
        self._slots.append(request.slot)
        request.pages, request.slot = [], None

    def schedule(self):
        """[(request, number of its tokens to compute), ...] for the next step."""
        self._admit()
        budget, plan = self.limits.max_step_tokens, []
        decoding = [r for r in self.running if r.num_left == 1]
        for request in decoding + [r for r in self.running if r.num_left > 1]:
            count = min(request.num_left, budget)
            if count:
                plan.append((request, count))
                budget -= count
        return plan

    def _admit(self):
        while self.waiting and self._slots:
            request = self.waiting[0]
            pages = self.pages.take(-(-request.max_num_tokens // PAGE_TOKENS))
            if pages is None:
                return
            request.pages, request.slot = pages, self._slots.pop()
            self.running.append(self.waiting.popleft())
