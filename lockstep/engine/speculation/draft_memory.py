"""Slots and pages of a draft model: which request has them, and what ended requests left there, until it is needed.

When a conversation goes on with its next turn, the draft model need not compute the earlier turns again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lockstep.engine.cache.pages import Held, PageGroup, PagePool
from lockstep.engine.request import Request
from lockstep.ops.attention.kv_cache import PAGE_TOKENS


@dataclass(eq=False)
class DraftSequence:
    """A request in the draft model: its slot and pages there. num_computed: how many known tokens the draft model has
    computed. guessed: its guesses after them that it has computed, too. is_dropped: there was no room for the request,
    which holds no pages and gets no drafts any more."""

    request: Request
    slot: int
    pages: list[Held]
    num_computed: int = 0
    guessed: list[int] = field(default_factory=list)
    is_dropped: bool = False

    @property
    def num_left(self) -> int:
        """Known tokens that the draft model has not computed."""
        return self.request.num_tokens - self.num_computed


@dataclass(eq=False)
class Leftover:
    """The slot and pages of an ended request, and the tokens that are computed there."""

    slot: int
    pages: list[Held]
    token_ids: list[int]
    cache_salt: str


class DraftMemory:
    """Gives sequences their slots and pages.

    groups: of pages. num_slots: the most sequences. has_states: whether layers have recurrent state, which a slot holds
    after the last computed token only."""

    def __init__(self, groups: Sequence[PageGroup], num_slots: int, has_states: bool) -> None:
        self.pages, self.free_slots, self._has_states = PagePool(groups), list(range(num_slots)), has_states
        self.leftovers: list[Leftover] = []  # in the order in which their requests ended

    def begin(self, request: Request) -> DraftSequence:
        """A DraftSequence for a request; it takes over the Leftover of the same salt with the most usable tokens."""
        known = request.token_ids(0, request.num_tokens - 1) if self.leftovers else []
        usable = [(self._num_usable(leftover, request.cache_salt, known), leftover) for leftover in self.leftovers]
        count, best = max(usable, key=lambda pair: pair[0], default=(0, None))
        if best is None or not count:
            if not self.free_slots:
                self.drop_oldest()
            return DraftSequence(request, self.free_slots.pop(), self.pages.none())
        self.leftovers.remove(best)
        self.pages.cut(best.pages, count)
        return DraftSequence(request, best.slot, best.pages, count)

    def _num_usable(self, leftover: Leftover, cache_salt: str, known: Sequence[int]) -> int:
        """How many of the known tokens a leftover has computed, with all pages that the next token sees: with recurrent
        states all tokens of the leftover or none, else whole pages."""
        if leftover.cache_salt != cache_salt:
            return 0
        if self._has_states:
            count = len(leftover.token_ids)
            return count if list(known[:count]) == leftover.token_ids else 0
        most = min(len(leftover.token_ids), len(known))
        starts = range(0, most, PAGE_TOKENS)
        parts = (slice(start, min(start + PAGE_TOKENS, most)) for start in starts)
        count = next((part.start for part in parts if leftover.token_ids[part] != list(known[part])), most)
        firsts = zip(leftover.pages, self.pages.groups, strict=True)
        return count if all(held.first <= group.first_seen(count) for held, group in firsts) else 0

    def grow(self, sequence: DraftSequence, num_tokens: int) -> bool:
        """Gives a sequence pages for num_tokens tokens in the layers without a window, and gives back the pages behind
        the windows; returns whether there were enough."""
        self.pages.drop_unseen(sequence.pages, sequence.num_computed)
        while not (is_enough := self.pages.take_all(sequence.pages, num_tokens)) and self.leftovers:
            self.drop_oldest()
        return is_enough

    def extend(self, sequence: DraftSequence, count: int) -> int:
        """Gives a sequence pages in all layers for up to `count` tokens after its computed ones; returns for how many
        tokens there are pages."""
        while (num_held := self.pages.extend(sequence.pages, sequence.num_computed, count)) < count and self.leftovers:
            self.drop_oldest()
        return num_held

    def stop(self, sequence: DraftSequence) -> None:
        """Takes back a sequence's pages: its request gets no guesses any more."""
        self.pages.give_back(sequence.pages)
        sequence.pages, sequence.is_dropped = self.pages.none(), True

    def end(self, sequence: DraftSequence) -> None:
        """Ends a sequence. Its slot and pages become a Leftover, if anything is computed there."""
        if not sequence.num_computed or sequence.is_dropped:
            self.stop(sequence)
            self.free_slots.append(sequence.slot)
            return
        self.pages.cut(sequence.pages, sequence.num_computed)
        tokens = sequence.request.token_ids(0, sequence.num_computed)
        self.leftovers.append(Leftover(sequence.slot, sequence.pages, tokens, sequence.request.cache_salt))

    def drop_oldest(self) -> None:
        """Gives up the oldest Leftover."""
        oldest = self.leftovers.pop(0)
        self.pages.give_back(oldest.pages)
        self.free_slots.append(oldest.slot)
