"""Which pages of the KV cache are free."""


class PageAllocator:
    """Hands out page ids 0 .. num_pages - 1, the lowest free ones last returned first."""

    def __init__(self, num_pages):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self):
        return len(self._free)

    def take(self, count):
        """`count` page ids, or None if there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages):
        self._free.extend(reversed(pages))
        assert len(self._free) <= self.num_pages, "a page was given back twice"
