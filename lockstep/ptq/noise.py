"""Signal to quantization noise: powers of weights and of their rounding errors, and their ratio in decibels."""

from __future__ import annotations

import numpy as np

from lockstep.native.kernel import interpreted, native
from lockstep.ops.math import log

DECIBELS = 10 / 2.302585092994046  # by which a natural logarithm becomes decibels


def powers(values: np.ndarray, rounded: np.ndarray) -> tuple[float, float]:
    """(Sum of squares of float32 values, sum of squares of their rounding errors).

    In float64 and in memory's order, so that both sums are the same on every machine.
    """
    signal, noise = _powers(values.reshape(-1), rounded.reshape(-1))
    return float(signal), float(noise)


@native
def _powers(values, rounded):
    signal, noise = 0.0, 0.0
    for i in range(values.size):
        x = np.float64(values[i])
        error = x - np.float64(rounded[i])
        signal += x * x
        noise += error * error
    return signal, noise


def decibels(signal: float, noise: float) -> float | None:
    """The ratio of two powers in decibels; None without noise or without signal."""
    return float(interpreted(log)(np.float32(signal / noise))) * DECIBELS if noise and signal else None
