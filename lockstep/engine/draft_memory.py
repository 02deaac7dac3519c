"""Slots and pages of a draft model: whose they are, and what ended requests left there, until the room is needed.

A conversation goes on with its next turn: what was read of it need not be read again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep.engine.pages import PageAllocator
from lockstep.engine.request import Request
from lockstep.engine.scheduler import pages_for
from lockstep.ops.kv_cache import PAGE_TOKENS


@dataclass(eq=False)
class Follower:
    """What the draft model holds of a request: its slot, its pages, how many known tokens are computed, and which
    guesses after them were computed too. is_done: it is not followed any more, and holds no pages."""

    request: Request
    slot: int
    pages: list[int] = field(default_factory=list)
    num_fed: int = 0
    guessed: list[int] = field(default_factory=list)
    is_done: bool = False

    @property
    def num_left(self) -> int:
        """Known tokens that are not computed."""
        return self.request.num_tokens - self.num_fed


@dataclass(eq=False)
class Left:
    """What a request left: the slot, the pages, and the tokens that are computed there."""

    slot: int
    pages: list[int]
    token_ids: list[int]
    cache_salt: str


class DraftMemory:
    """Gives followers their memory.

    num_slots: of followers; there are never more. has_states: whether layers have recurrent state, which lies in a slot
    after the last computed token only.
    """

    def __init__(self, num_pages: int, num_slots: int, has_states: bool) -> None:
        self.pages, self.free_slots, self._has_states = PageAllocator(num_pages), list(range(num_slots)), has_states
        self.left: list[Left] = []  # in the order in which they ended

    def begin(self, request: Request) -> Follower:
        """A Follower for a request, with what another of the same salt left of its first tokens, if there is one."""
        known = request.token_ids(0, request.num_tokens - 1) if self.left else []
        found = [(self._num_usable(each, request.cache_salt, known), each) for each in self.left]
        count, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or not count:
            if not self.free_slots:
                self.drop_oldest()
            return Follower(request, self.free_slots.pop())
        self.left.remove(best)
        kept = pages_for(count)
        self.pages.give_back(best.pages[kept:])
        return Follower(request, best.slot, best.pages[:kept], count)

    def _num_usable(self, left: Left, cache_salt: str, known: Sequence[int]) -> int:
        """How many of the known tokens are computed there: all of its own with states, else in whole pages."""
        if left.cache_salt != cache_salt:
            return 0
        if self._has_states:
            count = len(left.token_ids)
            return count if list(known[:count]) == left.token_ids else 0
        most = min(len(left.token_ids), len(known))
        starts = range(0, most, PAGE_TOKENS)
        parts = (slice(start, min(start + PAGE_TOKENS, most)) for start in starts)
        return next((part.start for part in parts if left.token_ids[part] != list(known[part])), most)

    def grow(self, follower: Follower, num_tokens: int) -> bool:
        """Gives a follower pages for so many tokens; whether there were enough."""
        wanted = max(0, pages_for(num_tokens) - len(follower.pages))
        while self.left and self.pages.num_free < wanted:
            self.drop_oldest()
        fresh = self.pages.take(wanted)
        follower.pages += fresh or []
        return fresh is not None

    def stop(self, follower: Follower) -> None:
        """Takes a follower's pages: it will have no guesses any more."""
        self.pages.give_back(follower.pages)
        follower.pages, follower.is_done = [], True

    def end(self, follower: Follower) -> None:
        """Takes back a follower's memory. What was computed there stays until the room is needed."""
        if not follower.num_fed or follower.is_done:
            self.stop(follower)
            self.free_slots.append(follower.slot)
            return
        kept, request = pages_for(follower.num_fed), follower.request
        self.pages.give_back(follower.pages[kept:])
        tokens = request.token_ids(0, follower.num_fed)
        self.left.append(Left(follower.slot, follower.pages[:kept], tokens, request.cache_salt))

    def drop_oldest(self) -> None:
        """Gives up what has been left for the longest time."""
        oldest = self.left.pop(0)
        self.pages.give_back(oldest.pages)
        self.free_slots.append(oldest.slot)
