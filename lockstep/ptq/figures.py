"""How well a grid fits what was seen at a site: rough figures for reports, from the histogram alone.

Numbers of a bin, a sixteenth of what lies between two powers of two, are taken as evenly spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockstep.native.kernel import interpreted
from lockstep.ops.math import log
from lockstep.ops.rounded import grids
from lockstep.ptq.observers import POINTS, Stat

DECIBELS = 10 / 2.302585092994046  # of a natural logarithm
FIGURED = (grids.INTEGER, grids.FLOAT)


@dataclass(frozen=True)
class Figures:
    """Of one grid. saturated: share of the numbers that are beyond its lowest or highest value. used: about how many of
    its codes some number is rounded to. codes: how many it has. sqnr: signal to quantization noise, about, in decibels;
    None if there is no noise, or no signal.
    """

    saturated: float
    used: int
    codes: int
    sqnr: float | None


def figures(stat: Stat, rows: np.ndarray) -> list[Figures] | None:
    """Of each head, or of all heads together, on grids float32 [heads or 1, GRID_WORDS].

    None for grids whose scales come from the numbers themselves (rows, blocks) and for those that are off: a histogram
    does not say how these round. ValueError for another number of grids, and if nothing finite was seen.
    """
    if len(rows) not in (1, stat.num_heads):
        raise ValueError(f"site {stat.site}: {len(rows)} grids, expected 1 or {stat.num_heads}")
    if any(row[grids.KIND] not in FIGURED for row in rows):
        return None
    seen = stat if len(rows) == stat.num_heads else stat.over_heads()
    if not seen.histogram.any((1, 2)).all():
        raise ValueError(f"site {stat.site}: calibration saw no finite number")
    return [_of_head(seen, head, row) for head, row in enumerate(rows)]


def _of_head(stat: Stat, head: int, row: np.ndarray) -> Figures:
    points, weights = stat.points(head)
    rounded = points.copy()
    grids.quantize_row(rounded, row)
    x, weights = points.astype(np.float64), weights.astype(np.float64)
    noise, signal = _sum(weights * (x - rounded) ** 2), _sum(weights * x * x)
    counts, ends = stat.bins(head)[2], points.reshape(-1, POINTS)[:, [0, -1]].T
    first, last = (_index(np.ascontiguousarray(end), row) for end in ends)
    lowest, highest = _index(np.array([-np.inf, np.inf], np.float32), row)
    return Figures(
        saturated=_sum(weights * _is_beyond(points, row)) / _sum(weights),
        used=_num_used(first, last, counts),
        codes=int(highest - lowest) + 1,
        sqnr=float(interpreted(log)(np.float32(signal / noise))) * DECIBELS if noise and signal else None,
    )


def _sum(x: np.ndarray) -> float:
    """Of float64, one after the other: NumPy's own sum has another order."""
    return float(np.cumsum(x)[-1])


def _is_beyond(x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which numbers a grid has no value for, but the last one on their side."""
    scaled = x * row[grids.INVERSE]
    if row[grids.KIND] == grids.FLOAT:
        return np.abs(scaled) > row[grids.LARGEST]
    code = np.rint(scaled) + row[grids.ZERO_POINT]
    return (code < row[grids.LOW]) | (code > row[grids.HIGH])


def _index(x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which of a grid's values numbers are rounded to: int64, one apart for neighbours."""
    if row[grids.KIND] == grids.INTEGER:
        code = np.rint(x * row[grids.INVERSE]) + row[grids.ZERO_POINT]
        return code.clip(row[grids.LOW], row[grids.HIGH]).astype(np.int64)
    unit, values = row.copy(), x * row[grids.INVERSE]
    unit[[grids.SCALE, grids.INVERSE]] = 1
    grids.quantize_row(values, unit)
    mantissa, emin = int(row[grids.MANTISSA]), int(row[grids.EMIN])
    above = np.maximum(np.frexp(np.abs(values))[1] - 1 - emin, 0)  # powers of two above the smallest normal one
    steps = np.ldexp(np.abs(values), mantissa - emin - above).astype(np.int64)
    return np.sign(values).astype(np.int64) * (steps + (above.astype(np.int64) << mantissa))


def _num_used(first: np.ndarray, last: np.ndarray, counts: np.ndarray) -> int:
    """How many codes numbers have, those of a bin between two codes: each one once, and no more than numbers."""
    before = np.concatenate([[first[0] - 1], np.maximum.accumulate(last)[:-1]])
    return int(np.minimum(counts, np.maximum(last - np.maximum(first, before + 1) + 1, 0)).sum())
