"""Slots and pages of a draft model: whose they are, and what ended requests left there, until the room is needed.

A conversation goes on with its next turn: what was read of it need not be read again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep.engine.cache.pages import Held, PageGroup, PagePool
from lockstep.engine.request import Request
from lockstep.ops.attention.kv_cache import PAGE_TOKENS


@dataclass(eq=False)
class Follower:
    """What the draft model holds of a request: its slot, its pages, how many known tokens are computed, and which
    guesses after them were computed too. is_done: it is not followed any more, and holds no pages."""

    request: Request
    slot: int
    pages: list[Held]
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
    pages: list[Held]
    token_ids: list[int]
    cache_salt: str


class DraftMemory:
    """Gives followers their memory.

    groups: of pages. num_slots: of followers; there are never more. has_states: whether layers have recurrent state,
    which lies in a slot after the last computed token only."""

    def __init__(self, groups: Sequence[PageGroup], num_slots: int, has_states: bool) -> None:
        self.pages, self.free_slots, self._has_states = PagePool(groups), list(range(num_slots)), has_states
        self.left: list[Left] = []  # in the order in which they ended

    def begin(self, request: Request) -> Follower:
        """A Follower for a request, with what another of the same salt left of its first tokens, if there is one."""
        known = request.token_ids(0, request.num_tokens - 1) if self.left else []
        found = [(self._num_usable(each, request.cache_salt, known), each) for each in self.left]
        count, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or not count:
            if not self.free_slots:
                self.drop_oldest()
            return Follower(request, self.free_slots.pop(), self.pages.none())
        self.left.remove(best)
        self.pages.cut(best.pages, count)
        return Follower(request, best.slot, best.pages, count)

    def _num_usable(self, left: Left, cache_salt: str, known: Sequence[int]) -> int:
        """How many of the known tokens are computed there, and what the next one sees: all of its own with states, else
        in whole pages."""
        if left.cache_salt != cache_salt:
            return 0
        if self._has_states:
            count = len(left.token_ids)
            return count if list(known[:count]) == left.token_ids else 0
        most = min(len(left.token_ids), len(known))
        starts = range(0, most, PAGE_TOKENS)
        parts = (slice(start, min(start + PAGE_TOKENS, most)) for start in starts)
        count = next((part.start for part in parts if left.token_ids[part] != list(known[part])), most)
        firsts = zip(left.pages, self.pages.groups, strict=True)
        return count if all(held.first <= group.first_seen(count) for held, group in firsts) else 0

    def grow(self, follower: Follower, num_tokens: int) -> bool:
        """Gives a follower pages for so many tokens in the layers that keep all; whether there were enough. What no
        token sees that is to be computed is given back in the others."""
        self.pages.drop_unseen(follower.pages, follower.num_fed)
        while not (is_there := self.pages.take_all(follower.pages, num_tokens)) and self.left:
            self.drop_oldest()
        return is_there

    def extend(self, follower: Follower, count: int) -> int:
        """Gives a follower pages for up to so many tokens after its computed ones, in all layers; for how many there
        are."""
        while (found := self.pages.extend(follower.pages, follower.num_fed, count)) < count and self.left:
            self.drop_oldest()
        return found

    def stop(self, follower: Follower) -> None:
        """Takes a follower's pages: it will have no guesses any more."""
        self.pages.give_back(follower.pages)
        follower.pages, follower.is_done = self.pages.none(), True

    def end(self, follower: Follower) -> None:
        """Takes back a follower's memory. What was computed there stays until the room is needed."""
        if not follower.num_fed or follower.is_done:
            self.stop(follower)
            self.free_slots.append(follower.slot)
            return
        self.pages.cut(follower.pages, follower.num_fed)
        tokens = follower.request.token_ids(0, follower.num_fed)
        self.left.append(Left(follower.slot, follower.pages, tokens, follower.request.cache_salt))

    def drop_oldest(self) -> None:
        """Gives up what has been left for the longest time."""
        oldest = self.left.pop(0)
        self.pages.give_back(oldest.pages)
        self.free_slots.append(oldest.slot)
