"""The step block of a Runner and the arrays that it points to. They are written through memoryviews: in a small step,
one assignment to a NumPy array would cost as much as writing the whole step."""

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.engine.cache.pages import Held
from lockstep.ops.sampling.sample import SAMPLING_RECORD
from lockstep.runtime.step_block import StepBlock

KINDS = {np.dtype(np.float32): "f", np.dtype(np.int32): "i", np.dtype(np.int64): "q"}
NAMES = SAMPLING_RECORD.names or ()
RECORD = struct.Struct("=" + "".join(KINDS[SAMPLING_RECORD[name]] for name in NAMES))
BLANK = dict.fromkeys(NAMES, 0)
assert RECORD.size == SAMPLING_RECORD.itemsize


def write(view: memoryview, at: int, numbers: Sequence[int]) -> None:
    """Writes numbers to int32 memory, from index `at` on."""
    view[at : at + len(numbers)] = array("i", numbers)


def records_view(records: np.ndarray) -> memoryview:
    """The memory of contiguous SAMPLING_RECORDs, for `write_record`."""
    return records.reshape(-1).view(np.uint8).data


def write_record(view: memoryview, row: int, fields: Mapping[str, Any]) -> None:
    """Writes a SAMPLING_RECORD with these fields, all others 0, to a row."""
    RECORD.pack_into(view, row * RECORD.size, *{**BLANK, **fields}.values())


class StepArrays:
    """A step block and the arrays that it points to. ints: {name: memory of an int32 array, flat}.

    rows: {letter: the most rows}. pages: of a request in each group. groups: of pages. given: arrays by name that
    already exist; all others are made here.
    """

    def __init__(
        self, rows: Mapping[str, int], pages: int, groups: int = 1, given: Mapping[str, np.ndarray] | None = None
    ) -> None:
        shapes = StepBlock.shapes(**rows, P=pages, W=groups)
        records, given = np.zeros(shapes.pop("sampling"), SAMPLING_RECORD), given or {}
        own = {name: np.zeros(shape, np.int32) for name, shape in shapes.items() if name not in given}
        self.arrays: dict[str, np.ndarray] = {"sampling": records, **own, **given}
        self.block = StepBlock.made(**self.arrays, pages_per_request=pages, num_page_groups=groups)
        self.ints = {name: self.arrays[name].reshape(-1).data for name in shapes}
        self._records, self._words = records_view(self.arrays["sampling"]), self.block.data
        self._number_of, self._pages_per_request, self._num_groups = StepBlock.numbers(), pages, groups
        self._pages: dict[int, tuple[int, list[int]]] = {}  # the pages written last, by row of the page table

    @property
    def records(self) -> np.ndarray:
        """The SAMPLING_RECORDs of the sampled rows."""
        return self.arrays["sampling"]

    def set_counts(self, **counts: int) -> None:
        """Sets counts of the step block, such as num_tokens."""
        for name, count in counts.items():
            self._words[self._number_of[name]] = count

    def set_pages(self, s: int, pages: list[Held]) -> None:
        """Writes the pages of the step's request number s, of each group; a single Held goes to all groups."""
        row = s * self._num_groups
        for held in pages if len(pages) == self._num_groups else pages * self._num_groups:
            last = self._pages.get(row)
            if last is None or last[0] != held.first or last[1] != held.ids:
                write(self.ints["page_table"], row * self._pages_per_request + held.first, held.ids)
                self._pages[row] = held.first, list(held.ids)
            row += 1

    def set_record(self, row: int, fields: Mapping[str, Any]) -> None:
        """Writes the SAMPLING_RECORD of a sampled row."""
        write_record(self._records, row, fields)

    def set_tokens(self, s: int, at: int, token_ids: Sequence[int], start: int) -> None:
        """Writes the tokens of the step's request number s, whose positions begin at `start`, to rows from `at` on."""
        ints, end = self.ints, start + len(token_ids)
        if end == start + 1:  # as while requests decode: two items are written faster than two arrays
            ints["token_ids"][at], ints["position"][at] = token_ids[0], start
        else:
            write(ints["token_ids"], at, token_ids)
            write(ints["position"], at, range(start, end))
        ints["context_len"][s] = end

    def lay_out(self, counts: Sequence[int]) -> None:
        """Writes which rows belong to which request. counts: the number of rows of each request, in order."""
        at = 0
        for s, count in enumerate(counts):
            write(self.ints["request"], at, (s,) * count)
            at += count
            self.ints["query_start"][s + 1] = at
        self.set_counts(num_tokens=at, num_requests=len(counts))
