"""Which ops of a program threads may begin while others are still at work on the ops before.

Threads meet after an op because the next one may read what it writes, write what it reads, or use its memory again, as
tensors do that are no longer needed. Neighbours that do none of this need no barrier between them: two layers that read
the same rows and write different columns, or the ends of a step for sampled and for embedded rows.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from lockstep.runtime.operands import Operands
from lockstep.runtime.program import CacheArray, Setting, Tensor

Place = Callable[[Tensor], tuple[int, int]]  # first and last byte of a tensor's memory, the last excluded


class Piece(NamedTuple):
    """A part of memory: bytes start .. end, of which an op that knows it touches only some columns of each row."""

    start: int
    end: int
    columns: range | None


class Touched(NamedTuple):
    """What an op reads and writes. lasting: caches and settings, by their identity, which are read and written."""

    read: list[Piece]
    written: list[Piece]
    lasting: set[int]


def may_go_on(ops: list[Operands], place: Place) -> list[bool]:
    """For each op, whether a thread that has done its share of it may begin the next op at once.

    Without a barrier threads are as far apart as the last one that they met at allows, so an op must be independent of
    all ops since then. After the last op threads always meet.
    """
    may, running = [], []
    for op, following in itertools.pairwise(ops):
        running.append(touched(op, place))
        after = touched(following, place)
        may.append(all(independent(before, after) for before in running))
        if not may[-1]:
            running.clear()
    return [*may, False] if ops else []


def touched(op: Operands, place: Place) -> Touched:
    """What an op touches."""
    read = [Piece(*place(value), op.columns(value)) for value in op.inputs if isinstance(value, Tensor)]
    written = [Piece(*place(value), op.columns(value)) for value in op.outputs]
    return Touched(read, written, {id(value) for value in op.inputs if isinstance(value, (CacheArray, Setting))})


def independent(one: Touched, other: Touched) -> bool:
    """Whether neither op writes what the other touches."""
    return not (
        one.lasting & other.lasting
        or any(_meet(a, b) for a in one.written for b in (*other.read, *other.written))
        or any(_meet(a, b) for a in one.read for b in other.written)
    )


def _meet(a: Piece, b: Piece) -> bool:
    """Whether two pieces of memory overlap; of one tensor, columns that do not overlap are apart."""
    if a[:2] == b[:2] and a.columns is not None and b.columns is not None:
        return max(a.columns.start, b.columns.start) < min(a.columns.stop, b.columns.stop)
    return max(a.start, b.start) < min(a.end, b.end)
