import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.rounded import grids
from lockstep.ptq import ranges, ranges_cpu
from lockstep.ptq.spec import GRIDS
from tests.ops.harness import same_bits

RNG = np.random.default_rng(19)
F32 = np.float32
NO_LIMIT = F32(np.inf)
WORDS = ["i2", "i4", "u4", "i8", "fp8", "fp4"]


def numbers(count):
    x = (RNG.standard_normal(count) * np.exp2(RNG.integers(-3, 4, count))).astype(F32)
    return x, RNG.integers(0, 1000, count).astype(F32)


def error(x, weights, g, unit, limit=NO_LIMIT):
    return ranges_cpu.squared_error(x.ctypes.data, weights.ctypes.data, x.size, g, unit, limit)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 256, 257, 1000])
def test_errors_have_the_bits_of_the_definition(word, count):
    x, weights = numbers(count)
    g, unit = GRIDS[word].row(), F32(3.7)
    ranges.set_range(g, x.min() * F32(0.7), x.max() * F32(0.7))
    expected = ranges.squared_error(x, weights, g, unit)
    same_bits(np.array(error(x, weights, g, unit), F32), np.array(expected, F32))
    same_bits(np.array(interpreted(ranges.squared_error)(x, weights, g, unit), F32), np.array(expected, F32))
    ones = ranges.squared_error(x, np.ones_like(x), g, unit)
    assert ranges_cpu.squared_error(x.ctypes.data, 0, count, g, unit, NO_LIMIT) == ones
    rounded = x.copy()
    grids.quantize_row(rounded, g)
    exact = (weights * ((x.astype(float) - rounded) * float(unit)) ** 2).sum()
    assert expected == pytest.approx(exact, rel=1e-5, abs=1e-9)
    assert error(x, weights, g, unit, expected) == expected
    assert error(x, weights, g, unit, F32(expected * 0.9)) > expected * 0.9


@pytest.mark.parametrize("word", WORDS)
def test_the_range_is_the_best_of_eighty(word):
    x, weights = numbers(777)
    found, unit = GRIDS[word].row(), GRIDS[word].row()
    ranges_cpu.search_range(found, x.min(), x.max(), x.ctypes.data, weights.ctypes.data, x.size)
    ranges.set_range(unit, x.min(), x.max())
    tried = []
    for i in range(80):
        g, factor = GRIDS[word].row(), F32(100 - i) / F32(100)
        ranges.set_range(g, x.min() * factor, x.max() * factor)
        tried.append((float(ranges.squared_error(x, weights, g, unit[grids.INVERSE])), i, g))
    same_bits(found, min(tried, key=lambda each: each[:2])[2])


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e30])
def test_errors_neither_vanish_nor_overflow(size):
    x = np.full(64, size, F32)
    x[0] = F32(3 * size)
    g = GRIDS["i2"].row()
    ranges_cpu.search_range(g, x.min(), x.max(), x.ctypes.data, 0, x.size)
    if size > 1e-8:
        assert g[grids.SCALE] == pytest.approx(size, rel=0.05)
    else:
        assert g[grids.SCALE] == F32(1e-8)


@pytest.mark.parametrize("word", [*WORDS, "nvfp4", "u16"])
def test_ranges_have_the_same_bits_interpreted(word):
    for low, high in ((-3, 5), (1, 2), (-2, -1), (0, 0), (-1e-9, 0), (-0.1, 1e20)):
        compiled, plain = GRIDS[word].row(), GRIDS[word].row()
        ranges.set_range(compiled, F32(low), F32(high))
        interpreted(ranges.set_range)(plain, F32(low), F32(high))
        same_bits(compiled, plain)


@pytest.mark.parametrize("value", [0.0, 1e-8, -1e-8, 3e-8, -3e-8, 0.3, -0.3])
def test_constants_have_the_same_bits_interpreted(value):
    compiled, plain = GRIDS["u8"].row(), GRIDS["u8"].row()
    ranges.set_constant(compiled, F32(value))
    interpreted(ranges.set_constant)(plain, F32(value))
    same_bits(compiled, plain)
    assert ranges.is_constant(F32(value), F32(value)) and not ranges.is_constant(F32(value), F32(value + 1e-7))
