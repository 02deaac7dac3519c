"""Which request holds which pages of the KV cache: reference counts, and names for pages whose content is worth finding
again.

Layers that see all keys of a sequence have pages of their own (a group), and so have the layers of each window length.
A request holds pages of layers with a window as long as a token that is yet to be computed sees them, and all other
pages until it ends.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from lockstep.ops.attention.kv_cache import PAGE_TOKENS


def pages_for(num_tokens: int) -> int:
    """The number of pages that hold the tokens of positions 0 .. num_tokens - 1."""
    return -(-num_tokens // PAGE_TOKENS)


def most_pages(num_tokens: int) -> int:
    """The most pages on which num_tokens neighbouring tokens can lie, whatever the position of the first; at least
    1."""
    return (num_tokens + PAGE_TOKENS - 2) // PAGE_TOKENS + 1


@dataclass(frozen=True)
class PageGroup:
    """The pages of all layers with the same window. num_pages: of all requests together. window: how many keys a token
    sees, its own included; 0: all keys up to its own."""

    num_pages: int
    window: int = 0

    def first_seen(self, position: int) -> int:
        """The number of the first page that a request's token at a position, or any token after it, sees."""
        return max(0, position + 1 - self.window) // PAGE_TOKENS if self.window else 0

    def needed(self, num_tokens: int) -> int:
        """The number of pages with which a request of num_tokens tokens can be computed token by token."""
        return min(pages_for(num_tokens), most_pages(self.window)) if self.window else pages_for(num_tokens)


@dataclass
class Held:
    """The pages of one group that a request holds. ids: the page ids of its pages number first, first + 1, ... in order
    of position. num_lent: how many of the last pages hold nothing but drafts."""

    first: int = 0
    ids: list[int] = field(default_factory=list)
    num_lent: int = 0

    @property
    def end(self) -> int:
        """The number of the page after the last one."""
        return self.first + len(self.ids)


def everywhere(page_ids: Sequence[int]) -> list[Held]:
    """The pages of a Span that has the same page ids in every group, from position 0 on."""
    return [Held(0, list(page_ids))]


class PageAllocator:
    """Hands out page ids 0 .. num_pages - 1 of one group.

    A page is held by one request or shared by several. A named page that no request holds is idle: it keeps its content
    until its memory is needed. Free pages are taken first, the one freed last before the others; then idle pages: first
    those that were given back as unwanted, then the least recently used.

    on_name: called with a name and whether it is there now, when a page gets or loses one; None: nobody wants to know.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.num_evicted = num_pages, 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # in the order in which they are taken
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self.on_name: Callable[[bytes, bool], object] | None = None

    @property
    def num_free(self) -> int:
        """Pages that can be taken: blank and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Named pages that no request holds."""
        return len(self._idle)

    @property
    def num_blank(self) -> int:
        """Pages that no request holds and that have no name."""
        return len(self._free)

    def take(self, num_pages: int) -> list[int] | None:
        """`num_pages` page ids, or None if fewer can be taken. Idle pages that are taken lose their name."""
        if num_pages > self.num_free:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(num_pages)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        name = self._name_of.pop(page)
        del self._page_of[name]
        self._note(name, False)
        self.num_evicted += 1
        return page

    def find(self, name: bytes) -> int | None:
        """The page with a name, or None."""
        return self._page_of.get(name)

    def forget(self, name: bytes) -> None:
        """Takes a name away from its page, if it has one: `find` no longer finds the page."""
        page = self._page_of.pop(name, None)
        if page is not None:
            del self._name_of[page]
            self._note(name, False)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def is_idle(self, page: int) -> bool:
        """Whether a page has a name and no request holds it."""
        return page in self._idle

    def share(self, page: int) -> None:
        """Adds a holder to a named page."""
        assert page in self._name_of, f"page {page} has no name"
        self._idle.pop(page, None)
        self._holders[page] += 1

    def name(self, page: int, name: bytes) -> None:
        """Names a held page by its content, unless another page has that name already."""
        assert self._holders[page], f"page {page} is held by nobody"
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name], self._name_of[page] = page, name
            self._note(name, True)

    def _note(self, name: bytes, is_there: bool) -> None:
        if self.on_name is not None:
            self.on_name(name, is_there)

    def give_back(self, pages: Sequence[int], is_wanted: bool = True) -> None:
        """Removes a holder from its pages, given in order of position: the last will be evicted first. is_wanted:
        whether other requests are likely to look for them."""
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
    """The pages of all groups: one allocator per group, and which pages a request takes and gives back as it grows.

    `pages` is everywhere the list of a request's Held, one of each group; `none` makes the list of a request without
    pages. has_windows: whether a group has a window, so that running requests give pages back.
    """

    def __init__(self, groups: Sequence[PageGroup]) -> None:
        self.groups = tuple(groups)
        self.allocators = [PageAllocator(group.num_pages) for group in groups]
        self.has_windows = any(group.window for group in groups)

    @property
    def num_pages(self) -> int:
        """Pages of all groups together; the other counts are of all groups, too."""
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
        """The pages of a request that has none yet."""
        return [Held() for _ in self.groups]

    def extend(self, pages: Sequence[Held], start: int, num_tokens: int, reserved: Sequence[int] = ()) -> int:
        """Takes pages for up to `num_tokens` tokens from position `start` on; returns for how many tokens every group
        has pages.

        reserved: of each group, how many free pages are not to be taken; empty: none.
        """
        for held in pages:  # a plain loop: every request comes here in every step, and mostly needs no page
            if (held.first + len(held.ids)) * PAGE_TOKENS < start + num_tokens:
                break
        else:
            return num_tokens
        pairs = zip(self.allocators, reserved or repeat(0), strict=False)
        free = [allocator.num_free - num_reserved for allocator, num_reserved in pairs]
        ends = (held.end + max(0, num_free) for held, num_free in zip(pages, free, strict=True))
        num_tokens = max(0, min(num_tokens, min(ends) * PAGE_TOKENS - start))
        self._take(pages, pages_for(start + num_tokens) if num_tokens else 0)
        return num_tokens

    def take_all(self, pages: Sequence[Held], num_tokens: int) -> bool:
        """Takes pages for num_tokens tokens in the groups without a window; returns whether there were enough."""
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

    def lend(self, pages: Sequence[Held], start: int, num_tokens: int) -> int:
        """Lends blank pages for up to `num_tokens` drafts from position `start` on, until `settle`; returns for how
        many drafts every group has pages."""
        ends = (held.end + allocator.num_blank for held, allocator in zip(pages, self.allocators, strict=True))
        num_tokens = max(0, min(num_tokens, min(ends) * PAGE_TOKENS - start))
        before = [held.end for held in pages]
        self._take(pages, pages_for(start + num_tokens))
        for held, end in zip(pages, before, strict=True):
            held.num_lent += held.end - end
        return num_tokens

    def _take(self, pages: Sequence[Held], end: int) -> None:
        """Takes the pages before number `end`, for which there must be enough free ones."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            if held.end < end:
                taken = allocator.take(end - held.end)
                assert taken is not None, (held, end, allocator.num_free)
                held.ids += taken

    def settle(self, pages: Sequence[Held], num_tokens: int) -> None:
        """Takes back the lent pages that hold none of the first num_tokens tokens; the others are lent no longer."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            if held.num_lent:
                self._cut(held, allocator, max(pages_for(num_tokens), held.end - held.num_lent))
                held.num_lent = 0

    def cut(self, pages: Sequence[Held], num_tokens: int) -> None:
        """Gives back the pages that hold none of the first num_tokens tokens."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            self._cut(held, allocator, pages_for(num_tokens))

    def _cut(self, held: Held, allocator: PageAllocator, end: int) -> None:
        assert end >= held.first, (held, end)
        allocator.give_back(held.ids[end - held.first :])
        del held.ids[end - held.first :]

    def drop_unseen(self, pages: Sequence[Held], position: int, stops: Sequence[int] = ()) -> None:
        """Gives back the pages that no token from a position on sees. stops: positions from which other requests may go
        on: the pages that a token sees there are given back as wanted."""
        for held, group, allocator in zip(pages, self.groups, self.allocators, strict=True):
            first = group.first_seen(position)
            for number in range(held.first, first):
                is_wanted = any(group.first_seen(stop) <= number < stop // PAGE_TOKENS for stop in stops)
                allocator.give_back(held.ids[number - held.first : number - held.first + 1], is_wanted)
            if first > held.first:
                del held.ids[: first - held.first]
                held.first = first

    def name(self, pages: Sequence[Held], number: int, name: bytes) -> None:
        """Names a request's page number `number` by its content, in every group."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            allocator.name(held.ids[number - held.first], name)

    def forget(self, name: bytes) -> None:
        """Takes a name away from its pages in every group."""
        for allocator in self.allocators:
            allocator.forget(name)

    def give_back(self, pages: Sequence[Held]) -> None:
        """Gives back all pages of a request."""
        for held, allocator in zip(pages, self.allocators, strict=True):
            allocator.give_back(held.ids)
