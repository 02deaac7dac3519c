"""How well a grid fits the numbers that calibration saw at a site: estimates for reports, from the histogram alone.

The numbers in a bin, a sixteenth of the range between two powers of two, are taken as evenly spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockstep.ops.rounded import grids
from lockstep.ptq.noise import decibels
from lockstep.ptq.observers import POINTS, Stat

FIGURED = (grids.INTEGER, grids.FLOAT)  # kinds of grids that have figures


@dataclass(frozen=True)
class Figures:
    """Estimates for one grid.

    saturated: share of the numbers beyond its lowest or highest value. used: how many of its codes at least one number
    is rounded to. codes: how many codes it has. sqnr: signal to quantization noise ratio in decibels; None without
    noise or without signal.
    """

    saturated: float
    used: int
    codes: int
    sqnr: float | None


def figures(stat: Stat, rows: np.ndarray) -> list[Figures] | None:
    """The figures of each head, or of all heads together, on grids `rows`, float32 [heads or 1, GRID_WORDS].

    None for grids whose scales come from the numbers themselves (per row or block) and for grids that are off: a
    histogram does not show how they round. ValueError for another number of grids, and if no finite number was seen.
    """
    if len(rows) not in (1, stat.num_heads):
        raise ValueError(f"site {stat.site}: {len(rows)} grids, expected 1 or {stat.num_heads}")
    if any(row[grids.KIND] not in FIGURED for row in rows):
        return None
    stat_of_grids = stat if len(rows) == stat.num_heads else stat.over_heads()
    if not stat_of_grids.histogram.any((1, 2)).all():
        raise ValueError(f"site {stat.site}: calibration saw no finite number")
    return [_of_head(stat_of_grids, head, row) for head, row in enumerate(rows)]


def _of_head(stat: Stat, head: int, row: np.ndarray) -> Figures:
    points, weights = stat.points(head)
    rounded = points.copy()
    grids.quantize_row(rounded, row)
    x, weights = points.astype(np.float64), weights.astype(np.float64)
    error = x - rounded
    noise, signal = _sum(weights * (error * error)), _sum(weights * x * x)
    counts, ends = stat.bins(head)[2], points.reshape(-1, POINTS)[:, [0, -1]].T
    first, last = (_index(np.ascontiguousarray(end), row) for end in ends)
    lowest, highest = _index(np.array([-np.inf, np.inf], np.float32), row)
    return Figures(
        saturated=_sum(weights * _is_beyond(points, row)) / _sum(weights),
        used=_num_used(first, last, counts),
        codes=int(highest - lowest) + 1,
        sqnr=decibels(signal, noise),
    )


def _sum(x: np.ndarray) -> float:
    """The sum of float64 in ascending order, which np.sum does not keep."""
    return float(np.cumsum(x)[-1])


def _is_beyond(x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Which numbers are beyond the grid's lowest or highest value."""
    scaled = x * row[grids.INVERSE]
    if row[grids.KIND] == grids.FLOAT:
        return np.abs(scaled) > row[grids.LARGEST]
    code = np.rint(scaled) + row[grids.ZERO_POINT]
    return (code < row[grids.LOW]) | (code > row[grids.HIGH])


def _index(x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The index, int64, of the grid value that each number is rounded to; adjacent values have adjacent indices."""
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
    """How many codes are used, if each bin (first and last code, number of numbers) uses all codes between its ends:
    each code counts once, and a bin uses no more codes than it has numbers."""
    before = np.concatenate([[first[0] - 1], np.maximum.accumulate(last)[:-1]])
    return int(np.minimum(counts, np.maximum(last - np.maximum(first, before + 1) + 1, 0)).sum())
