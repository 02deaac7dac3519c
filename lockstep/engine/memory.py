"""A runner's cache memory, page by page and slot by slot, as bytes that can be kept elsewhere and brought back."""

from collections.abc import Mapping, Sequence

import numpy as np

from lockstep.runtime.program import CacheArray


class Memory:
    """Copies pages and recurrent state out of the arrays of a Runner and into them, between steps.

    page_bytes, state_bytes: bytes of one page and of one slot over all layers, in the program's order of caches.
    """

    def __init__(self, caches: Sequence[CacheArray], arrays: Mapping[str, np.ndarray]) -> None:
        rows = [(c.kind, arrays[c.name].reshape(-1, c.bytes_each)) for c in caches]
        self._pages = [a for kind, a in rows if kind == "pages"]
        self._states = [a for kind, a in rows if kind == "state"]
        self.page_bytes = sum(a.shape[1] for a in self._pages)
        self.state_bytes = sum(a.shape[1] for a in self._states)

    def read_page(self, page: int, out: np.ndarray) -> None:
        _gather(self._pages, page, out)

    def write_page(self, page: int, data: np.ndarray) -> None:
        _scatter(self._pages, page, data)

    def read_state(self, slot: int, out: np.ndarray) -> None:
        _gather(self._states, slot, out)

    def write_state(self, slot: int, data: np.ndarray) -> None:
        _scatter(self._states, slot, data)


def _gather(arrays: Sequence[np.ndarray], row: int, out: np.ndarray) -> None:
    """Row `row` of every array, end to end, into uint8 [bytes]."""
    np.concatenate([a[row] for a in arrays], out=out)


def _scatter(arrays: Sequence[np.ndarray], row: int, data: np.ndarray) -> None:
    at = 0
    for a in arrays:
        a[row] = data[at : at + a.shape[1]]
        at += a.shape[1]
