"""Which pages of the KV cache are whose: reference counts, and names for pages whose content is worth finding again.

Layers that see all keys of a sequence, and layers that see a window of some length, each have pages of their own (a
group): those of a window are held as long as a token that is yet to be computed sees them, the others as long as their
request.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat

from lockstep.ops.attention.kv_cache import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """Pages that hold so many tokens from position 0 on."""
    return -(-num_tokens // PAGE_TOKENS)


def most_pages(num_tokens: int) -> int:
    """Pages that so many tokens may lie on, wherever they begin: at least one."""
    return (num_tokens + PAGE_TOKENS - 2) // PAGE_TOKENS + 1


@dataclass(frozen=True)
class PageGroup:
    """Pages that live equally long. num_pages: of all requests together. window: how many keys a token sees there, its
    own included; 0: all up to its own."""

    num_pages: int
    window: int = 0

    def first_seen(self, position: int) -> int:
        """The first page of a request that a token at a position, and any token after it, sees."""
        return max(0, position + 1 - self.window) // PAGE_TOKENS if self.window else 0

    def needed(self, num_tokens: int) -> int:
        """The pages with which a request of so many tokens can be computed one by one."""
        return min(pages_for(num_tokens), most_pages(self.window)) if self.window else pages_for(num_tokens)


@dataclass
class Held:
    """Pages of one group that a request holds: `ids` are those of its pages number first, first + 1, ... in order of
    position. num_lent: how many of the last hold nothing but drafts."""

    first: int = 0
    ids: list[int] = field(default_factory=list)
    num_lent: int = 0

    @property
    def end(self) -> int:
        """The number of the page after the last."""
        return self.first + len(self.ids)


def everywhere(page_ids: Sequence[int]) -> list[Held]:
    """What a Span holds if it has the same pages in every group, all of them from position 0 on."""
    return [Held(0, list(page_ids))]


class PageAllocator:
    """Hands out page ids 0 .. num_pages - 1 of one group.

    A page is held by one request or shared by several. A named page that nobody holds keeps its content (it is idle)
    until memory is needed: free pages are taken first, those freed last before others, then idle ones: first those that
    nobody is known to want, then the least recently used.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.num_evicted = num_pages, 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the order in which they are taken
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be taken: unused and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_blank(self) -> int:
        """Pages that nobody uses and that hold nothing."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` page ids, or None if there are not so many. What idle pages held is forgotten."""
        if count > self.num_free:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._name_of.pop(page)]
        self.num_evicted += 1
        return page

    def find(self, name: bytes) -> int | None:
        """The page with a name, or None."""
        return self._page_of.get(name)

    def forget(self, name: bytes) -> None:
        """Takes a name back: its page, if there is one, is found no more."""
        page = self._page_of.pop(name, None)
        if page is not None:
            del self._name_of[page]
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def share(self, page: int) -> None:
        """One more holder for a named page."""
        assert page in self._name_of, f"page {page} has no name"
        self._idle.pop(page, None)
        self._holders[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """Names a held page by its content, unless that content is in another page already."""
        assert self._holders[page], f"page {page} is held by nobody"
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name], self._name_of[page] = page, name

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def give_back(self, pages: Sequence[int], is_wanted: bool = True) -> None:
        """Ends a holder's claim on its pages, given in order of position: the last will be evicted first. is_wanted:
        whether others are likely to look for them."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} was given back twice"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._idle[page] = None
                self._idle.move_to_end(page, last=is_wanted)
            else:
                self._free.append(page)


class PagePool:
    """The pages of all groups: an allocator each, and how what a request holds of them follows its tokens.

    What a request holds is a list of Held, one of each group; `none` before it has any. has_windows: whether there is a
    group that gives pages back while a request runs.
    """

    def __init__(self, groups: Sequence[PageGroup]) -> None:
        self.groups = tuple(groups)
        self.allocators = [PageAllocator(group.num_pages) for group in groups]
        self.has_windows = any(group.window for group in groups)

    @property
    def num_pages(self) -> int:
        """Of all groups, as are the other counts."""
        return sum(group.num_pages for group in self.groups)

    @property
    def num_free(self) -> int:
        return sum(allocator.num_free for allocator in self.allocators)

    @property
    def num_idle(self) -> int:
        return sum(allocator.num_idle for allocator in self.allocators)

    @property
    def num_evicted(self) -> int:
        return sum(allocator.num_evicted for allocator in self.allocators)

    def none(self) -> list[Held]:
        """What a request holds that has no page yet."""
        return [Held() for _ in self.groups]

    def extend(self, pages: Sequence[Held], start: int, count: int, kept: Sequence[int] = ()) -> int:
        """Takes pages for up to `count` tokens from position `start` on; for how many every group has pages.

        kept: of each group, how many pages are left for others.
        """
        for held in pages:  # a loop, and no property: every step of every request comes here, and mostly goes on
            if (held.first + len(held.ids)) * PAGE_TOKENS < start + count:
                break
        else:
            return count
        free = [allocator.num_free - left for allocator, left in zip(self.allocators, kept or repeat(0), strict=False)]
        ends = (held.end + max(0, num_free) for held, num_free in zip(pages, free, strict=True))
        count = max(0, min(count, min(ends) * PAGE_TOKENS - start))
        self._take(pages, pages_for(start + count) if count else 0)
        return count

    def take_all(self, pages: Sequence[Held], num_tokens: int) -> bool:
        """Takes pages for so many tokens in the groups that keep all of them; whether there were enough."""
        whole = [
            (held, allocator)
            for held, group, allocator in zip(pages, self.groups, self.allocators, strict=True)
            if not group.window
        ]
        end = pages_for(num_tokens)
        if any(end - held.end > allocator.num_free for held, allocator in whole):
            return False
        for held, allocator in whole:
            held.ids += allocator.take(max(0, end - held.end)) or []
        return True

    def lend(self, pages: Sequence[Held], start: int, count: int) -> int:
        """The same for drafts, of pages that hold nothing; they are lent until `settle`."""
        ends = (held.end + allocator.num_blank for held, allocator in zip(pages, self.allocators, strict=True))
        count = max(0, min(count, min(ends) * PAGE_TOKENS - start))
        before = [held.end for held in pages]
        self._take(pages, pages_for(start + count))
        for held, end in zip(pages, before, strict=True):
            held.num_lent += held.end - end
        return count

    def _take(self, pages: Sequence[Held], end: int) -> None:
        """Takes pages up to number `end`, of which there are enough."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            if held.end < end:
                taken = allocator.take(end - held.end)
                assert taken is not None, (held, end, allocator.num_free)
                held.ids += taken

    def settle(self, pages: Sequence[Held], num_tokens: int) -> None:
        """Takes back what was lent and holds none of the first so many tokens."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            if held.num_lent:
                self._cut(held, allocator, max(pages_for(num_tokens), held.end - held.num_lent))
                held.num_lent = 0

    def cut(self, pages: Sequence[Held], num_tokens: int) -> None:
        """Gives back the pages after the first so many tokens."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            self._cut(held, allocator, pages_for(num_tokens))

    def _cut(self, held: Held, allocator: PageAllocator, end: int) -> None:
        assert end >= held.first, (held, end)
        allocator.give_back(held.ids[end - held.first :])
        del held.ids[end - held.first :]

    def drop_unseen(self, pages: Sequence[Held], position: int, stops: Sequence[int] = ()) -> None:
        """Gives back the pages that no token from a position on sees. stops: positions from which others may go on, who
        want what a token there sees."""
        for held, group, allocator in zip(pages, self.groups, self.allocators, strict=True):
            first = group.first_seen(position)
            for number in range(held.first, first):
                is_wanted = any(group.first_seen(stop) <= number < stop // PAGE_TOKENS for stop in stops)
                allocator.give_back(held.ids[number - held.first : number - held.first + 1], is_wanted)
            if first > held.first:
                del held.ids[: first - held.first]
                held.first = first

    def name(self, pages: Sequence[Held], number: int, name: bytes) -> None:
        """Names a request's page of a number by its content, in every group."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            allocator.name(held.ids[number - held.first], name)

    def forget(self, name: bytes) -> None:
        """Takes a name back in every group."""
        for allocator in self.allocators:
            allocator.forget(name)

    def give_back(self, pages: Sequence[Held]) -> None:
        """Ends a holder's claim on all its pages."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            allocator.give_back(held.ids)
