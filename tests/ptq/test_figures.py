import ml_dtypes
import numpy as np
import pytest

from lockstep.ops.rounded import grids
from lockstep.ptq.figures import figures
from lockstep.ptq.observers import Stat
from lockstep.ptq.spec import Spec
from tests.ptq.test_observers import seen, solved

RNG = np.random.default_rng(17)
X = RNG.standard_normal((200, 96)).astype(np.float32)


def exact(x, row):
    """(share beyond the grid, codes used, decibels), computed from the numbers instead of their histogram."""
    rounded = x.ravel().copy()
    grids.quantize_row(rounded, row)
    noise = ((x.ravel().astype(float) - rounded) ** 2).sum()
    low, high = float(rounded.min()), float(rounded.max())
    beyond = ((x < low - row[grids.SCALE] / 2) | (x > high + row[grids.SCALE] / 2)).mean()
    return beyond, len(np.unique(rounded)), 10 * np.log10((x.astype(float) ** 2).sum() / noise)


@pytest.mark.parametrize("text", ["i4", "u4", "i8", "u8:p99", "i8:p99.9", "i4:mse", "fp8", "fp4", "i12"])
def test_figures_are_near_those_of_the_numbers(text):
    [row] = solved(X, text)
    [found] = figures(seen(X), row[None])
    beyond, used, decibels = exact(X, row)
    assert found.sqnr == pytest.approx(decibels, abs=0.3)
    assert found.used == pytest.approx(used, rel=0.05 if text != "i12" else 0.3, abs=1)
    assert 0 < found.used <= found.codes
    if text.startswith(("i", "u")):
        assert found.saturated == pytest.approx(beyond, abs=2e-3)
        assert found.codes == 1 << int(text[1:].split(":")[0])
    least = {"u8:p99": 8e-3, "i8:p99.9": 5e-4, "i4:mse": 1e-3}.get(text, 0)
    assert found.saturated >= least and (least or found.saturated <= 1e-3)


@pytest.mark.parametrize(
    "text, dtype",
    [("fp8", ml_dtypes.float8_e4m3fn), ("fp8_e5m2", ml_dtypes.float8_e5m2), ("fp4", ml_dtypes.float4_e2m1fn)],
)
def test_codes_of_small_floats_are_all_their_values(text, dtype):
    bits = np.arange(256 if text != "fp4" else 16, dtype=np.uint8)
    values = bits.view(dtype).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    row = Spec.parse(text).what.row()
    row[[grids.SCALE, grids.INVERSE]] = 1
    [found] = figures(seen(values[None]), row[None])
    assert found.codes == found.used == len(values)
    assert found.saturated == 0


def test_a_bad_grid_looks_bad():
    [row] = solved(X, "i8")
    wrong = row.copy()
    wrong[grids.SCALE] *= 100
    wrong[grids.INVERSE] /= 100
    good, wide = figures(seen(X), row[None])[0], figures(seen(X), wrong[None])[0]
    assert wide.used == 3 < good.used and wide.sqnr < good.sqnr - 20
    wrong[grids.SCALE] /= 10000
    wrong[grids.INVERSE] *= 10000
    narrow = figures(seen(X), wrong[None])[0]
    assert narrow.saturated > 0.9 and good.saturated == 0


def test_figures_of_heads():
    stat = seen(X, num_heads=3)
    rows = stat.solve(Spec.parse("u8/head"))
    heads = figures(stat, rows)
    assert heads == [figures(seen(part), row[None])[0] for part, row in zip(np.split(X, 3, 1), rows, strict=True)]
    assert figures(stat, rows[:1]) == figures(seen(X), rows[:1])
    with pytest.raises(ValueError, match=r"site L0\.q: 2 grids, expected 1 or 3"):
        figures(stat, rows[:2])


def test_what_cannot_be_said():
    for text in ("mxfp4", "i8/row", "off", "nvfp4"):
        assert figures(seen(X), seen(X).solve(Spec.parse(text))) is None
    assert figures(seen(np.zeros((2, 8))), solved(X, "i8"))[0].sqnr is None
    with pytest.raises(ValueError, match=r"site L0\.q: calibration saw no finite number"):
        figures(Stat.empty("L0.q"), solved(X, "i8"))
