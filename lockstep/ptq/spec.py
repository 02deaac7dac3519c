"""`Spec`: the right side of a rule: which grid a tensor has, how many of them, and how their range is found.

    grid [/per] [:observer]        i8    u4/row:mse    u8/head:p99.99    i4/32    mxfp4    off

i2 .. i16 are symmetric: codes -2**(b - 1) .. 2**(b - 1) - 1 (numbers in range never get the lowest), zero point 0. u2
.. u16 are asymmetric: codes 0 .. 2**b - 1, with a zero point. All other grids are small floats or blocks of them; see
GRIDS and `ops/rounded/grids.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lockstep.ops.rounded import grids

MINMAX, MSE, PERCENTILE = "minmax", "mse", "percentile"


@dataclass(frozen=True)
class Grid:
    """A grid.

    word: its name in specs. kind: see `ops.rounded.grids`; None for a format that only stored weights have. bits: of a
    code, without scales. block: how many numbers share a scale that is computed from themselves; 0 for a grid without
    blocks. small_float: a name in SMALL_FLOATS. has_range: its scale must be found from a tensor's numbers. symmetric:
    its zero point is 0.
    """

    word: str
    kind: int | None
    bits: int
    block: int = 0
    small_float: str | None = None
    has_range: bool = False
    symmetric: bool = True

    @property
    def is_integer(self) -> bool:
        """Whether the grid is one of i2 .. i16, u2 .. u16."""
        return self.kind == grids.INTEGER

    @property
    def low(self) -> int:
        """The lowest code of an integer grid."""
        return -(1 << self.bits - 1) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The highest code of an integer grid."""
        return (1 << self.bits - self.symmetric) - 1

    def row(self) -> np.ndarray:
        """The grid as kernels read it, float32 [GRID_WORDS]. If it has a range, scale and zero point are 0."""
        words = np.zeros(grids.GRID_WORDS, np.float32)
        words[grids.KIND] = self.kind
        if self.is_integer:
            words[[grids.LOW, grids.HIGH]] = self.low, self.high
        elif self.small_float:
            indices = [grids.MANTISSA, grids.EMIN, grids.EMAX, grids.LARGEST]
            words[indices] = grids.SMALL_FLOATS[self.small_float]
        return words


def _integers() -> list[Grid]:
    letters, bits = {"i": True, "u": False}, range(2, 17)
    return [
        Grid(f"{letter}{b}", grids.INTEGER, b, has_range=True, symmetric=symmetric)
        for letter, symmetric in letters.items()
        for b in bits
    ]


SMALL = {
    "fp8": Grid("fp8", grids.FLOAT, 8, small_float="e4m3", has_range=True),
    "fp8_e5m2": Grid("fp8_e5m2", grids.FLOAT, 8, small_float="e5m2", has_range=True),
    "fp4": Grid("fp4", grids.FLOAT, 4, small_float="e2m1", has_range=True),
}
BLOCKS = {
    "mxint8": Grid("mxint8", grids.MICROSCALED, 8, grids.MICROSCALED_BLOCK, "int8"),
    "mxfp8": Grid("mxfp8", grids.MICROSCALED, 8, grids.MICROSCALED_BLOCK, "e4m3"),
    "mxfp8_e5m2": Grid("mxfp8_e5m2", grids.MICROSCALED, 8, grids.MICROSCALED_BLOCK, "e5m2"),
    "mxfp4": Grid("mxfp4", grids.MICROSCALED, 4, grids.MICROSCALED_BLOCK, "e2m1"),
    "nvfp4": Grid("nvfp4", grids.NVFP4, 4, grids.NVFP4_BLOCK, has_range=True),
    "q8_0": Grid("q8_0", grids.Q8, 8, grids.MICROSCALED_BLOCK),
}
STORED = {"q4_0": Grid("q4_0", None, 4, 32)}  # for weights only
OFF = Grid("off", grids.OFF, 32)
GRIDS: Mapping[str, Grid] = {g.word: g for g in _integers()} | SMALL | BLOCKS | STORED | {OFF.word: OFF}
ACTIVATIONS_IN_TEXT = ", ".join(["i2 .. i16", "u2 .. u16", *SMALL, *BLOCKS, OFF.word])
GRID_WORDS_IN_TEXT = ", ".join([ACTIVATIONS_IN_TEXT, *STORED])
TEXT = re.compile(r"(?P<grid>\w+)(?:/(?P<per>\w{1,20}))?(?::(?P<observer>[\w.]+))?", re.ASCII)
NUMBER = re.compile(r"\d{1,3}(\.\d{1,9})?", re.ASCII)
MAX_GROUP = 1 << 20


@dataclass(frozen=True)
class Spec:
    """A grid, how many of them a tensor has, and how their range is found.

    grid: a word of GRIDS. per: what has a scale of its own: "tensor", "head", "row" (of an activation: a token, whose
    scale comes from the row itself; of a weight: an output feature), or a number of a weight's input features.
    observer: "minmax", "mse" or "p" and a percentage. None for per or observer: the usual one, see `resolved`. Raises
    ValueError for a combination that neither weights nor activations have.
    """

    grid: str
    per: str | int | None = None
    observer: str | None = None

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise ValueError(f"{self.grid!r} is no grid; there are {GRID_WORDS_IN_TEXT}")
        self._check_per()
        self._check_observer()

    def _check_per(self) -> None:
        if self.per is None:
            return
        grid, block = GRIDS[self.grid], GRIDS[self.grid].block
        allowed = "one of /tensor, /head, /row or a number of a weight's columns, as /32"
        if isinstance(self.per, int):
            if not 2 <= self.per <= MAX_GROUP:
                raise ValueError(f"{self}: a group of {self.per} columns, expected 2 to {MAX_GROUP}")
            if not grid.is_integer:
                raise ValueError(f"{self}: groups of columns are for integers (i2 .. u16), {self.grid} is none")
        elif self.per not in ("tensor", "head", "row"):
            raise ValueError(f"{self}: {self.per!r} is nothing that has a grid of its own; expected {allowed}")
        if not grid.has_range:
            why = f"has a scale for each {block} numbers" if block else "has no scale"
            raise ValueError(f"{self}: {self.grid} {why} and nothing else; expected {self.grid}")

    def _check_observer(self) -> None:
        if self.observer is None:
            return
        if not GRIDS[self.grid].has_range:
            raise ValueError(f"{self}: {self.grid} has no range that an observer would find; expected {self.grid}")
        if self.observer in (MINMAX, MSE):
            if self.observer == MSE and GRIDS[self.grid].block:
                raise ValueError(f"{self}: mse is for grids without blocks of their own, {self.grid} has some")
            return
        percentile = _percentile(self.observer)
        if percentile is None:
            raise ValueError(
                f"{self}: {self.observer!r} is no observer; expected minmax, mse or a percentile above 50 and up to "
                f"100 with up to 9 digits after the point, as p99.9"
            )
        object.__setattr__(self, "observer", f"p{percentile:.9f}".rstrip("0").rstrip("."))

    @staticmethod
    def parse(text: str) -> Spec:
        """The spec that a text stands for; ValueError names what is allowed."""
        match = TEXT.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise ValueError(f"{text!r} is no grid of a plan; expected grid[/per][:observer], as i8 or u4/row:mse")
        per = match["per"]
        return Spec(match["grid"], int(per) if per and per.isdigit() else per, match["observer"])

    def __str__(self) -> str:
        per = f"/{self.per}" if self.per is not None else ""
        return f"{self.grid}{per}{':' + self.observer if self.observer is not None else ''}"

    # ------------------------------------------------------------ properties

    @property
    def what(self) -> Grid:
        """The grid."""
        return GRIDS[self.grid]

    @property
    def bits(self) -> int:
        """Bits of a code; 32 for "off"."""
        return self.what.bits

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0."""
        return self.what.symmetric

    @property
    def is_off(self) -> bool:
        """Whether numbers stay as they are."""
        return self.what is OFF

    @property
    def percentile(self) -> float | None:
        """The percentage of a percentile observer; None for any other observer."""
        return _percentile(self.observer) if self.observer else None

    def activation_row(self) -> np.ndarray:
        """An activation's grid as kernels read it, float32 [GRID_WORDS]. If it has a range, scale and zero point are
        0."""
        row = self.what.row()
        if self.per == "row":
            row[grids.KIND] = grids.ROW_SYMMETRIC if self.symmetric else grids.ROW_ASYMMETRIC
        return row

    # ------------------------------------------------------------ for a site

    def resolved(self, is_weight: bool) -> Spec:
        """The spec of a weight or an activation, with the usual per and observer in place of None.

        Usual are minmax, and one grid per tensor for activations and nvfp4, per row for other weights.
        ValueError for a spec that weights, or activations, cannot have.
        """
        grid, per, observer = self.what, self.per, self.observer
        (self._check_weight if is_weight else self._check_activation)()
        if grid.has_range:
            per = per or ("row" if is_weight and not grid.block else "tensor")
            observer = observer or (None if per == "row" and not is_weight else MINMAX)
        return replace(self, per=per, observer=observer)

    def _check_weight(self) -> None:
        if self.per == "head":
            raise ValueError(f"{self}: a weight has no heads; expected /tensor, /row or columns, as /32")
        if self.per == "row" and self.what.block:
            raise ValueError(f"{self}: a weight on {self.grid} has one scale beside its blocks'; expected /tensor")
        if self.percentile is not None:
            raise ValueError(f"{self}: a weight's range is found by minmax or mse, not by a percentile")

    def _check_activation(self) -> None:
        if self.what.kind is None:
            raise ValueError(f"{self}: {self.grid} is a format of weights; expected {ACTIVATIONS_IN_TEXT}")
        if isinstance(self.per, int):
            raise ValueError(f"{self}: groups of columns are for weights; an activation has /tensor, /head or /row")
        if self.per == "row" and not self.what.is_integer:
            raise ValueError(f"{self}: only integers take a scale from the row itself; expected /tensor or /head")
        if self.per == "row" and self.observer is not None:
            raise ValueError(f"{self}: a row's range comes from the row itself; expected {self.grid}/row")


def _percentile(observer: str) -> float | None:
    """The percentage of an observer such as "p99.9"; None for a text that is no percentile."""
    if not observer.startswith("p") or not NUMBER.fullmatch(observer[1:]):
        return None
    value = float(observer[1:])
    return value if 50 < value <= 100 else None
