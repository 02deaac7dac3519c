"""A packed weight of equal parts below one another, a matrix for each expert, whose parts are packed when a step first
reads them."""

import threading
from collections.abc import Callable, Iterable

import numpy as np

from lockstep.formats.parts.panels import PANEL, num_panels
from lockstep.runtime.backend import Layout
from lockstep.runtime.executor import aligned
from lockstep.runtime.program import Weight


class PackedParts:
    """arrays: of the whole weight, in the layout of `formats.pack.pack`; those of parts that are not packed yet are
    zeros, which take no memory. Any thread may call `pack`.

    on_packed: called after each part was packed. It may raise an error; then the part does not count as packed.
    """

    def __init__(self, weight: Weight, layout: Layout, num_parts: int, on_packed: Callable[[], object]) -> None:
        self.weight, self.layout, self.num_parts = weight, layout, num_parts
        self._make: Callable[..., tuple[np.ndarray, ...]] = layout.make  # of some rows, too: `formats.pack.pack`
        self._on_packed, self._lock = on_packed, threading.Lock()
        self._missing = set(range(num_parts))
        self._rows = weight.shape[0] // num_parts
        assert self._rows % PANEL == 0, (weight.name, weight.shape, num_parts)
        empty = self._make(weight, range(0))
        self.arrays = tuple(_zeros(num_panels(weight.shape[0]), array) for array in empty)

    @property
    def num_packed(self) -> int:
        """How many parts are packed."""
        return self.num_parts - len(self._missing)

    @property
    def is_whole(self) -> bool:
        """Whether all parts are packed."""
        return not self._missing

    def pack(self, parts: Iterable[int]) -> None:
        """Packs those of the parts that are not packed yet. ValueError for weights that are not finite, and for a file
        that was changed or cut short."""
        for part in parts:
            with self._lock:
                if part in self._missing:
                    self._pack(part)
                    self._on_packed()
                    self._missing.remove(part)

    def _pack(self, part: int) -> None:
        rows, panels = self._rows, self._rows // PANEL
        packed = self._make(self.weight, range(part * rows, (part + 1) * rows))
        for array, made in zip(self.arrays, packed, strict=True):
            array[part * panels : (part + 1) * panels] = made[:panels]


def _zeros(count: int, like: np.ndarray) -> np.ndarray:
    """Zeros [count, ...] of the type and the further dimensions of an array."""
    shape = (count, *like.shape[1:])
    return aligned(int(np.prod(shape)) * like.itemsize).view(like.dtype).reshape(shape)
