"""Differences of two trials on the same windows; their confidence intervals tell differences from noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lockstep.study.scoring.figures import INTERVAL, mean_and_error


class Difference(NamedTuple):
    """A mean difference of losses with its confidence interval, whose ends are None for a single window."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


def difference(trial: Mapping[str, Any], other: Mapping[str, Any]) -> Difference:
    """How much more a trial loses than another, window by window."""
    pairs = zip(trial["window_nll"], other["window_nll"], strict=True)
    mean, error = mean_and_error([a - b for a, b in pairs])
    half = None if error is None else INTERVAL * error
    return Difference(mean, None, None) if half is None else Difference(mean, mean - half, mean + half)


def from_float(trial: Mapping[str, Any]) -> Difference:
    """How much more a trial loses than the model in float."""
    metrics = trial["metrics"]
    return Difference(metrics["delta_nll"], metrics.get("delta_low"), metrics.get("delta_high"))
