"""`Stat`: statistics of the numbers that calibration saw at a site, and the grids that fit them.

Statistics are integer counts, minima and maxima, so merging them in any order gives the same result. Grids are made
from them without running the model again, by IEEE additions, multiplications and divisions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lockstep.ops.rounded import observe
from lockstep.ops.rounded.observe import BINS, COUNT, FIRST_BIN, HISTOGRAM, MAXIMUM, MINIMUM, NOT_FINITE, SHIFT, WORDS
from lockstep.ptq.ranges import is_constant, set_constant, set_range
from lockstep.ptq.ranges_cpu import search_range
from lockstep.ptq.spec import MINMAX, MSE, Spec

POINTS = 8  # sample points that stand for the numbers of a bin in sums of errors
EDGES = (np.arange(FIRST_BIN, FIRST_BIN + BINS + 1, dtype=np.int32) << SHIFT).view(np.float32).astype(np.float64)
EDGES[0], EDGES[-1] = 0, np.inf  # the first and last bin also count smaller and larger numbers


@dataclass(eq=False)
class Stat:
    """The statistics of a site, for each of its heads.

    count, not_finite: int64 [heads], how many numbers were seen, and how many of them are NaN or infinite. low, high:
    float32 [heads], smallest and largest finite number; inf and -inf if there is none. histogram: int64 [heads, 2,
    BINS], see `ops.rounded.observe`.
    """

    site: str
    count: np.ndarray
    not_finite: np.ndarray
    low: np.ndarray
    high: np.ndarray
    histogram: np.ndarray

    @staticmethod
    def empty(site: str, num_heads: int = 1) -> Stat:
        """The statistics of no numbers."""
        zeros, infinite = np.zeros(num_heads, np.int64), np.full(num_heads, np.inf, np.float32)
        return Stat(site, zeros, zeros.copy(), infinite, -infinite, np.zeros((num_heads, 2, BINS), np.int64))

    @property
    def num_heads(self) -> int:
        """How many heads have statistics of their own."""
        return len(self.count)

    def take(self, counters: np.ndarray) -> None:
        """Adds the counters of an observing op, int32 [copies * heads, WORDS], and clears them.

        ValueError if the counters overflowed since they were last taken.
        """
        words = counters.reshape(-1, self.num_heads, WORDS)
        if (words[..., COUNT] == observe.TOO_MANY).any():
            raise ValueError(
                f"site {self.site}: more than {observe.MOST} numbers were counted before they were read; read after "
                f"fewer steps"
            )
        extremes = words[..., [MINIMUM, MAXIMUM]].view(np.float32)
        self.count += words[..., COUNT].sum(0, np.int64)
        self.not_finite += words[..., NOT_FINITE].sum(0, np.int64)
        self.low = np.minimum(self.low, extremes[..., 0].min(0))
        self.high = np.maximum(self.high, extremes[..., 1].max(0))
        self.histogram += words[..., HISTOGRAM:].sum(0, np.int64).reshape(self.num_heads, 2, BINS)
        observe.clear(counters)

    def merge(self, other: Stat) -> Stat:
        """The statistics of both. ValueError for statistics of different sites."""
        if (self.site, self.num_heads) != (other.site, other.num_heads):
            raise ValueError(
                f"statistics of {other.site} with {other.num_heads} heads cannot be merged with those of {self.site} "
                f"with {self.num_heads}"
            )
        return Stat(
            self.site,
            self.count + other.count,
            self.not_finite + other.not_finite,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.histogram + other.histogram,
        )

    def over_heads(self) -> Stat:
        """The statistics of all heads together."""
        add: Callable[[np.ndarray], np.ndarray] = lambda array: array.sum(0, keepdims=True)
        low, high = self.low.min(keepdims=True), self.high.max(keepdims=True)
        return Stat(self.site, add(self.count), add(self.not_finite), low, high, add(self.histogram))

    # ------------------------------------------------------------ grids

    def solve(self, spec: Spec) -> np.ndarray:
        """The grids of an activation's spec that fit: float32 [heads, GRID_WORDS] for /head, else [1, GRID_WORDS].

        ValueError for numbers that are not finite, and if the spec needs a range and no number was seen.
        """
        spec = spec.resolved(is_weight=False)
        stat = self if spec.per == "head" else self.over_heads()
        rows = np.tile(spec.activation_row(), (stat.num_heads, 1))
        if not spec.is_off:
            self._check_finite()
        if spec.observer is not None:
            self._check_seen()
            for head, row in enumerate(rows):
                stat.fit(row, head, spec)
        return rows

    def _check_finite(self) -> None:
        if self.not_finite.any():
            raise ValueError(
                f"site {self.site}: {self.not_finite.sum()} of {self.count.sum()} numbers are NaN or infinite"
                f"{self._where(self.not_finite > 0)}; a grid needs finite numbers"
            )

    def _check_seen(self) -> None:
        if (self.count == 0).any():
            raise ValueError(f"site {self.site}: calibration saw no number{self._where(self.count == 0)}")

    def _where(self, heads: np.ndarray) -> str:
        return f" (head {np.flatnonzero(heads)[0]})" if self.num_heads > 1 else ""

    def fit(self, row: np.ndarray, head: int, spec: Spec) -> None:
        """Sets scale and zero point of a grid to the range of a head."""
        low, high = self.low[head], self.high[head]
        if not spec.symmetric and is_constant(low, high):
            set_constant(row, low)
        elif spec.observer == MINMAX or spec.percentile == 100:
            set_range(row, low, high)
        elif spec.observer == MSE:
            points, weights = self.points(head)
            search_range(row, low, high, points.ctypes.data, weights.ctypes.data, points.size)
        else:
            set_range(row, *self._tails(head, spec))
        if not np.isfinite(row).all():
            raise ValueError(
                f"site {self.site}: its numbers are from {low:g} to {high:g}, which has no scale in float32"
            )

    def _tails(self, head: int, spec: Spec) -> tuple[np.float32, np.float32]:
        """The range of a percentile: of absolute values for a symmetric grid; else of the numbers, cut on the side of 0
        on which they all are, or by one half on each side."""
        assert spec.percentile is not None
        share = spec.percentile / 100
        if spec.symmetric:
            bound = self._absolute().quantile(head, share)
            return np.float32(-bound), np.float32(bound)
        if self.low[head] >= 0 or self.high[head] <= 0:
            low, high = (0.0, share) if self.low[head] >= 0 else (1 - share, 1.0)
        else:
            low, high = (1 - share) / 2, 1 - (1 - share) / 2
        return np.float32(self.quantile(head, low)), np.float32(self.quantile(head, high))

    # ------------------------------------------------------------ the histogram

    def _absolute(self) -> Stat:
        """The statistics of absolute values."""
        low = np.maximum(np.maximum(self.low, -self.high), np.float32(0))
        histogram = np.stack([self.histogram.sum(1), np.zeros_like(self.histogram[:, 0])], 1)
        return Stat(self.site, self.count, self.not_finite, low, np.maximum(-self.low, self.high), histogram)

    def bins(self, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bins that are not empty, ascending: the lowest and highest number each may hold, float64, and their
        counts."""
        positive, negative = self.histogram[head]
        left = np.concatenate([-EDGES[:0:-1], EDGES[:-1]])
        right = np.concatenate([-EDGES[-2::-1], EDGES[1:]])
        counts = np.concatenate([negative[::-1], positive])
        some, low, high = counts > 0, np.float64(self.low[head]), np.float64(self.high[head])
        return left[some].clip(low, high), right[some].clip(low, high), counts[some]

    def quantile(self, head: int, share: float) -> float:
        """The number below which a share (0 to 1) of all numbers is; numbers in a bin are taken as evenly spread.

        Error: the width of a bin, a sixteenth of the number. Shares 0 and 1 give the smallest and largest number.
        """
        left, right, counts = self.bins(head)
        if share in (0, 1):
            return float(right[-1] if share else left[0])
        rank, after = share * (int(counts.sum()) - 1), np.cumsum(counts)
        bin = int(np.searchsorted(after, int(rank), "right"))
        inside = (rank - float(after[bin] - counts[bin]) + 0.5) / float(counts[bin])
        return float(left[bin] + (right[bin] - left[bin]) * min(inside, 1.0))

    def points(self, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample points, POINTS for each bin, and how many numbers each stands for: float32."""
        left, right, counts = self.bins(head)
        inside = (np.arange(POINTS) + 0.5) / POINTS
        points = left[:, None] + (right - left)[:, None] * inside
        return points.astype(np.float32).ravel(), np.repeat((counts / POINTS).astype(np.float32), POINTS)
