"""How far rounded weights are from what they were: signal to quantization noise."""

from __future__ import annotations

import numpy as np

from lockstep.native.kernel import interpreted, native
from lockstep.ops.math import log
from lockstep.ptq.figures import DECIBELS


def powers(values: np.ndarray, rounded: np.ndarray) -> tuple[float, float]:
    """(Sum of the squares of float32 values, sum of those of their differences to the rounded ones).

    In float64, one after the other in memory's order, so that both are the same wherever they are computed.
    """
    signal, noise = _powers(values.reshape(-1), rounded.reshape(-1))
    return float(signal), float(noise)


@native
def _powers(values, rounded):
    signal, noise = 0.0, 0.0
    for i in range(values.size):
        x = np.float64(values[i])
        apart = x - np.float64(rounded[i])
        signal += x * x
        noise += apart * apart
    return signal, noise


def decibels(signal: float, noise: float) -> float | None:
    """A ratio of powers, as `figures` gives it; None if there is no noise, or no signal."""
    return float(interpreted(log)(np.float32(signal / noise))) * DECIBELS if noise and signal else None
