import math
import re

import numpy as np
import pytest

from lockstep.ops.rounded import grids, observe
from lockstep.ops.rounded.observe import COUNT, TOO_MANY, cleared
from lockstep.ptq import ranges
from lockstep.ptq.observers import Stat
from lockstep.ptq.spec import GRIDS, Spec

RNG = np.random.default_rng(9)


def seen(x, site="L0.q", num_heads=1):
    """The statistics of arrays [tokens, heads * width]."""
    stat = Stat.empty(site, num_heads)
    for rows in x if isinstance(x, list) else [x]:
        words = cleared(num_heads, 1)
        for head, part in enumerate(np.split(np.asarray(rows, np.float32), num_heads, axis=-1)):
            observe.observe_row(np.ascontiguousarray(part).ravel(), words[head])
        stat.take(words)
        assert (words == cleared(num_heads, 1)).all()
    return stat


def solved(x, text, **options):
    return seen(x, **options).solve(Spec.parse(text))


def fields(row):
    """(scale, zero, low, high) of an integer grid."""
    return tuple(float(row[i]) for i in (grids.SCALE, grids.ZERO_POINT, grids.LOW, grids.HIGH))


def same_stat(a, b):
    assert (a.site, a.num_heads) == (b.site, b.num_heads)
    for name in ("count", "not_finite", "low", "high", "histogram"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


X = RNG.standard_normal((64, 96)).astype(np.float32) * np.repeat([1, 3, 0.01], 32).astype(np.float32)


def test_merging_does_not_depend_on_the_order():
    whole, parts = seen(X, num_heads=3), [seen(x, num_heads=3) for x in np.split(X, 4)]
    same_stat(parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3]), whole)
    same_stat(parts[3].merge(parts[1].merge(parts[0].merge(parts[2]))), whole)
    same_stat(seen(np.split(X, 8), num_heads=3), whole)
    same_stat(whole.merge(Stat.empty("L0.q", 3)), whole)
    same_stat(whole.over_heads(), seen(X))
    with pytest.raises(ValueError, match=r"L1\.q with 3 heads cannot be merged with those of L0\.q with 3"):
        whole.merge(Stat.empty("L1.q", 3))


def test_minmax_has_the_published_scales():
    low, high = float(X.min()), float(X.max())
    scale, zero, *codes = fields(solved(X, "i8")[0])
    assert codes == [-128, 127] and zero == 0 and scale == pytest.approx(max(-low, high) / 127, rel=1e-6)
    scale, zero, *codes = fields(solved(X, "u4")[0])
    assert codes == [0, 15] and scale == pytest.approx((high - low) / 15, rel=1e-6)
    assert zero == round(-low / ((high - low) / 15))
    for text, largest in (("fp8", 448), ("fp8_e5m2", 57344), ("fp4", 6), ("nvfp4", 6 * 448)):
        row = solved(X, text)[0]
        assert row[grids.SCALE] == pytest.approx(max(-low, high) / largest, rel=1e-6)
        assert row[grids.INVERSE] == np.float32(1) / row[grids.SCALE]
        expected = GRIDS[text].row()
        expected[[grids.SCALE, grids.INVERSE]] = row[[grids.SCALE, grids.INVERSE]]
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize(
    "value, expected",
    [(0.0, (1, 0)), (1e-8, (1, 0)), (0.3, (np.float32(0.3), 0)), (-0.3, (np.float32(0.3), 255)), (-1e-9, (1, 0))],
)
def test_a_constant_is_exact_on_an_asymmetric_grid(value, expected):
    for text in ("u8", "u8:mse", "u8:p99"):
        row = solved(np.full((4, 8), value), text)[0]
        assert fields(row)[:2] == tuple(map(float, expected))
    if abs(value) > 0.1:
        x = np.full(3, value, np.float32)
        grids.quantize_row(x, row)
        assert (x == np.float32(value)).all()


def test_scales_have_a_smallest():
    for text in ("i8", "fp8", "nvfp4"):
        assert solved(np.zeros((2, 8)), text)[0, grids.SCALE] == np.float32(1e-8)
    assert solved(np.array([[0, 1e-7]]), "u8")[0, grids.SCALE] == np.float32(1e-8)
    with pytest.raises(ValueError, match=r"site L0\.q: its numbers are from -3e\+38 to 3e\+38, which has no scale"):
        solved(np.array([[-3e38, 3e38]]), "u8")


def test_a_grid_for_each_head_is_that_of_the_head_alone():
    rows = solved(X, "u8/head:p99", num_heads=3)
    assert rows.shape == (3, 8) and rows.dtype == np.float32
    for head, part in enumerate(np.split(X, 3, axis=1)):
        np.testing.assert_array_equal(rows[head], solved(part, "u8:p99")[0])
    np.testing.assert_array_equal(solved(X, "u8:p99", num_heads=3), solved(X, "u8:p99"))


@pytest.mark.parametrize("text", ["mxfp4", "q8_0", "i8/row", "u4/row", "off"])
def test_grids_without_a_range_need_no_numbers(text):
    [row] = Stat.empty("L0.q").solve(Spec.parse(text))
    kinds = dict(mxfp4=grids.MICROSCALED, q8_0=grids.Q8, off=grids.OFF)
    kinds |= {"i8/row": grids.ROW_SYMMETRIC, "u4/row": grids.ROW_ASYMMETRIC}
    assert row[grids.KIND] == kinds[text]
    if text == "u4/row":
        assert row[[grids.LOW, grids.HIGH]].tolist() == [0, 15]


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.25, 0.5, 0.9, 0.999, 1])
@pytest.mark.parametrize("x", [X, np.abs(X), -np.abs(X), np.exp(X), np.zeros((1, 5)), np.array([[-2, 7]], np.float32)])
def test_quantiles_are_within_a_bin(x, share):
    found, ordered = seen(x).quantile(0, share), np.sort(x.astype(np.float32).ravel()).astype(np.float64)
    at = ordered[int(share * (x.size - 1))]
    assert abs(found - at) <= abs(at) / 16
    assert ordered[0] <= found <= ordered[-1]
    if share in (0, 1):
        assert found == at


def test_numbers_in_a_bin_are_evenly_spread():
    x = np.linspace(16, 17, 1001)[:-1]  # the bin of 16 .. 17
    for share in (0.1, 0.5, 0.77):
        assert seen(x[None]).quantile(0, share) == pytest.approx(16 + share, abs=2e-3)


def test_percentiles_cut_where_numbers_are():
    p = 97.5
    sizes = np.quantile(np.abs(X), p / 100)
    assert solved(X, "i8:p97.5")[0, grids.SCALE] == pytest.approx(sizes / 127, rel=1 / 16)
    assert solved(X, "fp8:p97.5")[0, grids.SCALE] == pytest.approx(sizes / 448, rel=1 / 16)
    both = np.quantile(X, [0.0125, 0.9875])
    assert solved(X, "u8:p97.5")[0, grids.SCALE] == pytest.approx((both[1] - both[0]) / 255, rel=1 / 16)
    for sign in (1, -1):
        scale, zero, *_ = fields(solved(sign * np.abs(X), "u8:p97.5")[0])
        assert scale == pytest.approx(sizes / 255, rel=1 / 16)
        assert zero == (0 if sign > 0 else 255)
    np.testing.assert_array_equal(solved(X, "u8:p100"), solved(X, "u8"))


@pytest.mark.parametrize("text", ["i4:mse", "u4:mse", "i8:mse", "fp4:mse"])
def test_mse_is_the_best_of_all_factors(text):
    spec, x = Spec.parse(text).resolved(False), np.concatenate([X[:, :32].ravel(), np.array([20.0, -9.0], np.float32)])

    def error(factor):
        row = spec.what.row()
        ranges.set_range(row, np.float32(x.min() * factor), np.float32(x.max() * factor))
        rounded = x.copy()
        grids.quantize_row(rounded, row)
        return float(((x.astype(np.float64) - rounded) ** 2).sum())

    [row] = solved(x[None], text)
    rounded = x.copy()
    grids.quantize_row(rounded, row)
    found = float(((x.astype(np.float64) - rounded) ** 2).sum())
    best = min(error(np.float32((100 - i) / 100)) for i in range(80))
    assert found <= 1.05 * best  # numbers of a bin are taken as evenly spread
    assert found < 0.9 * error(np.float32(1)) or text == "i8:mse"


def test_what_was_not_seen_or_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"^site L3\.k\.all: calibration saw no number$"):
        Stat.empty("L3.k.all").solve(Spec.parse("i8"))
    half = np.array([[1.0, np.nan], [2.0, np.inf]])
    with pytest.raises(ValueError, match=re.escape("site L0.q: 2 of 4 numbers are NaN or infinite (head 1); a grid")):
        solved(half, "i8/head", num_heads=2)
    with pytest.raises(ValueError, match="2 of 4 numbers are NaN or infinite"):
        solved(half, "mxfp8")
    assert solved(half, "off").shape == (1, 8)
    empty = Stat.empty("L0.q", 2)
    words = cleared(2, 1)
    observe.observe_row(np.ones(3, np.float32), words[0])
    empty.take(words)
    with pytest.raises(ValueError, match=r"site L0\.q: calibration saw no number \(head 1\)"):
        empty.solve(Spec.parse("i8"))
    words[1, COUNT] = TOO_MANY
    with pytest.raises(ValueError, match=r"site L0\.q: more than 2147483647 numbers were counted before they were"):
        empty.take(words)
    with pytest.raises(ValueError, match="groups of columns are for weights"):
        empty.solve(Spec.parse("i8/32"))
    assert math.isinf(empty.high[1])
