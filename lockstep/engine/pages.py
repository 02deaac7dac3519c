"""Which pages of the KV cache are whose: reference counts, and names for pages whose content is worth finding again."""

from collections import OrderedDict
from collections.abc import Sequence


class PageAllocator:
    """Hands out page ids 0 .. num_pages - 1.

    A page is held by one request or shared by several. A named page that nobody holds keeps its content (it is idle)
    until memory is needed: free pages are taken first, those freed last before others, then idle ones, least recently
    used first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.num_evicted = num_pages, 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be taken: unused and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

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

    def give_back(self, pages: Sequence[int]) -> None:
        """Ends a holder's claim on its pages, given in order of position: the last will be evicted first."""
        for page in reversed(pages):
            assert self._holders[page], f"page {page} was given back twice"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._name_of:
                self._idle[page] = None
            else:
                self._free.append(page)
