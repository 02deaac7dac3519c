"""Philox and its noise: known answers, lanes as scalars, and the Gumbel distribution."""

import numpy as np
import pytest
from numba import njit

from lockstep.native.kernel import STRICT, interpreted
from lockstep.native.simd import store
from lockstep.ops.sampling.philox import noise, noise_lanes, philox, philox_lanes

# counter, key and output of the generator's own known-answer file (kat_vectors of Random123)
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@njit(**STRICT)
def by_lanes(seed, position, words, noises):
    for first in range(0, words.size, 64):
        for j, w in enumerate(philox_lanes(first, position, seed)):
            store(words.ctypes.data + 4 * (first + 16 * j), w)
            store(noises.ctypes.data + 4 * (first + 16 * j), noise_lanes(w))


@pytest.mark.parametrize("counter,key,words", KNOWN)
def test_known_answers(counter, key, words):
    assert philox(*counter, *key) == words
    assert interpreted(philox)(*counter, *key) == words


@pytest.mark.parametrize("seed,position", [(0, 0), (-1, 7), (2**63 - 1, 2**40 + 3), (-(2**63), 2**31)])
def test_lanes_equal_definition(seed, position):
    words, noises = np.empty(256, np.int32), np.empty(256, np.float32)
    by_lanes(seed, position, words, noises)
    expected = np.array([noise(seed, position, t) for t in range(256)], np.float32)
    assert noises.tobytes() == expected.tobytes()
    slow = np.array([interpreted(noise)(np.int64(seed), np.int64(position), t) for t in range(0, 256, 5)], np.float32)
    assert slow.tobytes() == expected[::5].tobytes()


def test_noise_follows_the_gumbel_distribution():
    words, noises = np.empty(1 << 20, np.int32), np.empty(1 << 20, np.float32)
    by_lanes(1, 2, words, noises)
    assert np.isfinite(noises).all()
    x = np.sort(noises.astype(np.float64))
    distance = np.abs(np.exp(-np.exp(-x)) - (np.arange(x.size) + 0.5) / x.size).max()
    assert distance < 1.63 / np.sqrt(x.size)  # Kolmogorov-Smirnov at 1 %
    assert 11 < x[-1] < 20 and abs(x.mean() - 0.5772) < 0.005


def test_extremes_of_the_noise_are_finite():
    from lockstep.ops.sampling.philox import gumbel

    low, high = interpreted(gumbel)(np.float32(2**31 - 1)), interpreted(gumbel)(np.float32(0))
    assert -2.9 < low < -2.8 and 22.1 < high < 22.3
