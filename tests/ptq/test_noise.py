"""Signal and noise of rounded weights are sums in one order, in float64."""

import numpy as np

from lockstep.ptq.noise import decibels, powers


def test_sums_are_those_of_one_number_after_the_other():
    values = np.random.RandomState(3).randn(7, 33).astype(np.float32) * np.float32(1e3)
    rounded = np.rint(values).astype(np.float32)
    signal = noise = 0.0
    for x, y in zip(values.ravel().tolist(), rounded.ravel().tolist(), strict=True):
        signal += x * x
        noise += (x - y) * (x - y)
    assert powers(values, rounded) == (signal, noise)
    assert abs(decibels(signal, noise) - 10 * np.log10(signal / noise)) < 1e-4


def test_what_is_exact_has_no_noise():
    values = np.ones((2, 3), np.float32)
    assert powers(values, values) == (6.0, 0.0) and decibels(6.0, 0.0) is None and decibels(0.0, 1.0) is None
