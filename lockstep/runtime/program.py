"""A model as a program: a flat list of ops over named tensors, recorded once when the model is loaded.

The number of tokens is symbolic: a tensor's first dimension is "T" (tokens of the step), "R" (rows that sample), "E"
(rows whose hidden state is wanted), "O" (rows of either sort) or "S" (requests), its second a number. Everything else
is a way of running or rewriting this list.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lockstep.runtime.step_block import StepBlock

ROW_COUNTS = {letter: index for letter, index in StepBlock.counts().items() if letter not in "PW"}
CACHE_KINDS = ("pages", "state", "ring", "records")
DTYPES = {"f32": np.dtype(np.float32), "i32": np.dtype(np.int32), "bf16": np.dtype(np.uint16), "i8": np.dtype(np.int8)}


class PositionSource(Protocol):
    """Computes the rows of a Table."""

    def cover(self, num_positions: int) -> None:
        """Computes those of the first num_positions rows that are not computed yet."""


@dataclass(frozen=True)
class Tensor:
    """An activation [rows, width]; rows is "T", "O", "R", "E" or "S"."""

    name: str
    rows: str
    width: int
    dtype: str = "f32"

    def __str__(self):
        return f"{self.name} {self.dtype}[{self.rows}, {self.width}]"


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant of the model: one stored tensor, or several with the same input joined along their rows.

    shape is logical (output features, input features); format says how it is multiplied ("f32", "bf16", "q8_0", ...).
    """

    name: str
    format: str
    shape: tuple
    parts: tuple  # StoredTensor, top to bottom
    whole: "Weight | None" = None  # the weight of which this one is the first rows, in the same memory

    def first_rows(self, num_rows: int) -> "Weight":
        """The first rows, which take no memory of their own. ValueError if there are fewer."""
        if not 0 < num_rows <= self.shape[0]:
            raise ValueError(f"weight {self.name}: {num_rows} rows of {self.shape[0]}")
        return replace(self, shape=(num_rows, *self.shape[1:]), whole=self.whole or self)


@dataclass(frozen=True, eq=False)
class Table:
    """Constants with a row for each position, which are computed as far as steps need them.

    rows: float32 [positions, width], on a cache line. source: computes the rows, of this table and of all others that
    share the source.
    """

    name: str
    rows: np.ndarray
    source: PositionSource


@dataclass(frozen=True, eq=False)
class Setting:
    """Numbers that whoever runs the program may write or read between steps: grids of a quantization plan, counters.

    values: [rows, columns], contiguous. Kernels read this very array, so that a change of values records, compiles and
    allocates nothing.
    """

    name: str
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.values.shape


@dataclass(frozen=True)
class CacheArray:
    """Memory that outlives a step: KV pages (kind "pages") or, for each request, recurrent state ("state"), rows by
    position ("ring"), or the changes that drafts would make to a state ("records").

    shape: of one page or of one request's slot. window: of pages, how many keys a token sees at most, its own included;
    0: all keys up to its own. group: the number of the window among the program's windows; a request has a page table
    for each group.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple
    window: int = 0
    group: int = 0

    @property
    def bytes_each(self):
        return int(np.prod(self.shape)) * DTYPES[self.dtype].itemsize


class Program:
    """Ops in the order in which they run, and the tensors that the caller reads and writes.

    results: {name: Tensor} of tensors that are read after a step, whose memory no later op may use. given: tensors that
    the caller writes before a step, in memory of their own.
    """

    def __init__(self):
        self.ops, self.caches, self.results, self._names = [], [], {}, set()
        self.given: list[Tensor] = []
        self._written: set[Tensor] = set()

    def tensor(self, name, rows, width, dtype="f32"):
        """A new activation under a name of its own (a number is added to a name that is taken)."""
        if rows not in ROW_COUNTS or dtype not in DTYPES or not (isinstance(width, int) and width > 0):
            raise ValueError(
                f"tensor {name}: {dtype}[{rows}, {width!r}], expected one of {', '.join(DTYPES)}, rows of "
                f"{', '.join(ROW_COUNTS)} and a positive width"
            )
        unique, number = name, 2
        while unique in self._names:
            unique, number = f"{name}.{number}", number + 1
        self._names.add(unique)
        return Tensor(unique, rows, width, dtype)

    def give(self, name: str, rows: str, width: int, dtype: str = "f32") -> Tensor:
        """A new activation that the caller writes before a step: one of `given`."""
        tensor = self.tensor(name, rows, width, dtype)
        self.given.append(tensor)
        self._written.add(tensor)
        return tensor

    def emit(self, op) -> Any:
        """Appends an op (`runtime.operands.Operands`) and returns its first output.

        ValueError if the op reads a tensor that no op before it writes, or another program's cache.
        """
        for value in op.inputs:
            if isinstance(value, Tensor) and value not in self._written:
                raise ValueError(f"{op}: no op before it writes {value}")
            if isinstance(value, CacheArray) and not any(value is cache for cache in self.caches):
                raise ValueError(f"{op}: {value.name} is no cache of this program")
        self._written.update(op.outputs)
        self.ops.append(op)
        return op.outputs[0] if op.outputs else None

    def cache(self, name, kind, dtype, shape, window=0):
        """Declares memory that outlives a step; see CacheArray."""
        array = CacheArray(name, kind, dtype, tuple(shape), window, self._group(window) if kind == "pages" else 0)
        if not isinstance(window, int) or window < 0 or (window and kind != "pages"):
            raise ValueError(f"{array}: expected a window of 0 or more for pages, and none for others")
        if kind not in CACHE_KINDS or dtype not in DTYPES or not all(isinstance(n, int) and n > 0 for n in shape):
            kinds, dtypes = ", ".join(CACHE_KINDS), ", ".join(DTYPES)
            raise ValueError(f"{array}: expected one of {kinds}, one of {dtypes}, and a shape of positive integers")
        if any(cache.name == name for cache in self.caches):
            raise ValueError(f"{array}: there is another cache of this name")
        self.caches.append(array)
        return array

    def cache_named(self, name: str) -> CacheArray:
        """The declared cache of a name."""
        return next(cache for cache in self.caches if cache.name == name)

    def windows(self) -> list[int]:
        """The window of each group of pages, by its number."""
        return list(dict.fromkeys(cache.window for cache in self.caches if cache.kind == "pages"))

    def _group(self, window: int) -> int:
        """The number of the group of pages of a window, which may be new."""
        known = self.windows()
        return known.index(window) if window in known else len(known)

    def rewritten(self, ops):
        """A copy of the program with another list of ops; what is added to one of the two later is not in the other."""
        copy = Program()
        copy.ops, copy.caches, copy.given = list(ops), list(self.caches), list(self.given)
        copy.results, copy._names = dict(self.results), set(self._names)
        copy._written = {*self.given, *(tensor for op in copy.ops for tensor in op.outputs)}
        return copy

    def weights(self):
        """Every weight, in order of first use, once."""
        weights = {}
        for op in self.ops:
            for value in op.inputs:
                if isinstance(value, Weight):
                    weights.setdefault(value.name, value)
        return list(weights.values())

    def sources(self) -> list[PositionSource]:
        """The sources of all tables, each once."""
        sources = {id(v.source): v.source for op in self.ops for v in op.inputs if isinstance(v, Table)}
        return list(sources.values())
