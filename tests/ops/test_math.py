"""Elementary functions: scalars equal lanes and plain Python, and errors are bounded in ulp."""

import functools

import numpy as np
import pytest
from numba import njit

from lockstep.native.kernel import STRICT, interpreted
from lockstep.native.simd import load, store
from lockstep.ops import math

FUNCTIONS = {
    "exp": (math.exp, np.exp, (-87, 88)),
    "sigmoid": (math.sigmoid, lambda x: 1 / (1 + np.exp(-x)), (-80, 80)),
    "silu": (math.silu, lambda x: x / (1 + np.exp(-x)), (-80, 80)),
    "log": (math.log, np.log, (1e-3, 8)),
    "log1p": (math.log1p, np.log1p, (-0.999, 1)),
}
# float32 at even distances of their bits between two positive ones, negated too where the function allows it
BIT_GRIDS = {
    "exp": (math.exp, np.exp, (2.0**-40, 87), True, 1),
    "log": (math.log, np.log, (2.0**-126, 3.4e38), False, 0.9),
    "log1p": (math.log1p, np.log1p, (2.0**-60, 1 - 2.0**-24), True, 2.5),
    "log1p large": (math.log1p, np.log1p, (1, 2.0**24), False, 2),
}


@functools.cache
def compiled(function):
    @njit(**STRICT)
    def scalars(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    @njit(**STRICT)
    def sixteens(x, out):
        for i in range(0, x.size, 16):
            store(out.ctypes.data + 4 * i, function(load(x.ctypes.data + 4 * i)))

    return scalars, sixteens


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalar_lanes_and_interpreted_agree_and_are_accurate(name):
    function, exact, (low, high) = FUNCTIONS[name]
    x = np.linspace(low, high, 1 << 16).astype(np.float32)
    scalar, lane = np.empty_like(x), np.empty_like(x)
    for run, out in zip(compiled(function), (scalar, lane), strict=True):
        run(x, out)
    assert scalar.tobytes() == lane.tobytes()
    few = x[::997]
    slow = np.array([interpreted(function)(v) for v in few], np.float32)
    assert slow.tobytes() == scalar[::997].tobytes()
    reference = exact(x.astype(np.float64))
    ulp = np.abs(scalar - reference) / np.spacing(np.abs(reference).astype(np.float32))
    assert ulp.max() < 4, ulp.max()


@pytest.mark.parametrize("name", BIT_GRIDS)
def test_accuracy_over_all_magnitudes(name):
    function, exact, (low, high), negative, bound = BIT_GRIDS[name]
    first, last = np.array([low, high], np.float32).view(np.uint32)
    x = np.linspace(first, last, 1 << 16).astype(np.uint32).view(np.float32)
    for signed in [x, -x] if negative else [x]:
        out = np.empty_like(signed)
        compiled(function)[0](signed, out)
        reference = exact(signed.astype(np.float64))
        ulp = np.abs(out - reference) / np.spacing(np.abs(reference).astype(np.float32))
        assert ulp.max() < bound, (signed[ulp.argmax()], ulp.max())


def test_exact_points():
    assert interpreted(math.log)(np.float32(1)) == 0
    assert interpreted(math.log1p)(np.float32(0)) == 0


def test_one_plus_exp_is_one_and_exp():
    every_size = np.linspace(0, 0x7F800000, 1 << 18).astype(np.uint32).view(np.float32)
    x = np.concatenate([every_size, -every_size, np.linspace(-90, 90, 1 << 16, dtype=np.float32)])
    x = np.concatenate([x, np.full(15, np.nan, np.float32)])[: x.size // 16 * 16 + 16]
    parts, scalar, lane = (np.empty_like(x) for _ in range(3))
    compiled(math.exp)[0](np.where(x < 88, x, np.float32(88)), parts)
    for run, out in zip(compiled(math.one_plus_exp), (scalar, lane), strict=True):
        run(x, out)
    assert scalar.tobytes() == lane.tobytes() == (np.float32(1) + parts).tobytes()


def test_exp_is_zero_far_below():
    scalars, _ = compiled(math.exp)
    x = np.array([-87.5, -1e4, -np.inf, -3e38], np.float32)
    out = np.empty_like(x)
    scalars(x, out)
    assert (out == 0).all()
