"""Integer linear layers with fixed-point outputs: against Python's own integers, and kernel against definition."""

import math

import numpy as np
import pytest

from lockstep.formats.parts.panels import padded_width
from lockstep.native.kernel import interpreted
from lockstep.ops import BACKENDS
from lockstep.ops.integer import code_fixed
from lockstep.ops.integer.code_fixed import CodeFixed
from lockstep.ops.rounded.grids import FLOAT, HIGH, KIND, LOW, SCALE, ZERO_POINT
from tests.ops.harness import run_op, same_bits
from tests.ops.integer import test_code_linear as cases

OUTS = [cases.grid(0.5, 0, -128, 127), cases.grid(0.25, 100, 0, 255), cases.grid(1e-3, 0, -32768, 32767)]


def run(layer, grid, backend="cpu", num_threads=1):
    N, K = layer.codes.shape
    sizes = dict(in_features=K, out_features=N, width=padded_width(N), column=0)
    rows = dict(x=layer.rows, weight=layer.weight(), grid=grid, residual=layer.residual)
    return run_op(BACKENDS[backend], CodeFixed, num_threads=num_threads, **rows, **sizes)["out"][:, :N]


def rounded(acc, m):
    """acc * M / 2**shift in Python's integers, half away from zero."""
    f, e = math.frexp(m)
    M, shift = math.floor(f * 2.0**31 + 0.5), 31 - e
    top, bottom = abs(acc) * M << max(-shift, 0), 1 << max(shift, 0)
    return (1 if acc >= 0 else -1) * ((2 * top + bottom) // (2 * bottom))


@pytest.mark.parametrize("out", OUTS, ids=cases.name_of)
@pytest.mark.parametrize("grid", [cases.U8, cases.I16, cases.OF_ROWS[1]], ids=cases.name_of)
def test_kernel_equals_definition_and_pythons_integers(grid, out):
    made = cases.layer(grid, 13, K=70, N=43, codes=(0, 15), residual=out is OUTS[0])
    same_bits(run(made, out, num_threads=3), run(made, out, "reference"))
    made.residual = None
    x_scales, sums = cases.decoded(made.rows, 70)[1].astype(np.float64), made.sums()
    expected = np.empty(sums.shape, np.float32)
    for t, n in np.ndindex(*sums.shape):
        m = x_scales[t] * float(made.scale[n]) / float(out[0, SCALE])
        code = min(max(rounded(int(sums[t, n]), m) + int(out[0, ZERO_POINT]), out[0, LOW]), out[0, HIGH])
        expected[t, n] = np.float32(code - out[0, ZERO_POINT]) * out[0, SCALE]
    same_bits(run(made, out), expected)
    float_codes = np.rint(cases.Layer(made.rows, made.codes, made.scale, made.zero).run("cpu") / out[0, SCALE])
    inside = np.abs(float_codes) < 100
    assert np.abs(expected / out[0, SCALE] - float_codes)[inside].max() <= 1


def test_every_multiplier():
    """Sums of up to 2**39, shifts beyond both ends, ties of both signs."""
    rng = np.random.default_rng(0)
    sums = [0, 1, -1, 3, -3, 2**31, -(2**31), 2**39, -(2**39), *map(int, rng.integers(-(2**39), 2**39, 50))]
    exact = [0.5, 0.25, 1.0, 2.0**-31, 2.0**-60, 2.0**-100, 2.0**13, 2.0**14, 2.0**20, 2.0**40, 0.0]
    as_python = interpreted(code_fixed.requantized)
    for m in [*exact, *np.exp2(rng.uniform(-45, 20, 50))]:
        for acc in sums:
            expected = max(-code_fixed.MAX_RESULT, min(code_fixed.MAX_RESULT, rounded(acc, float(m))))
            found = code_fixed.requantized(acc, float(m))
            beyond = abs(expected) >= code_fixed.MAX_LARGE_SUM // 2 and m >= 0.5  # a clamp hides the difference
            assert found == expected or (beyond and abs(found) > 2**17 and (found > 0) == (expected > 0)), (acc, m)
            assert as_python(acc, float(m)) == found
    assert [code_fixed.requantized(n, 0.5) for n in (1, -1, 3, -3)] == [1, -1, 2, -2]


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e4, 1e30])
def test_extreme_scales(scale):
    for grid in cases.ENDS:
        made, out = cases.extreme_layer(grid, 96, 20), cases.grid(scale, 5, -32768, 32767)
        same_bits(run(made, out), run(made, out, "reference"))


def test_what_has_no_code_is_nan():
    made, float_grid = cases.layer(cases.U8, 3), OUTS[0].copy()
    float_grid[0, KIND] = FLOAT
    x = np.zeros((3, 100), np.float32)
    x[1, 4] = np.nan
    for backend in ("cpu", "reference"):
        assert np.isnan(run(made, float_grid, backend)).all()
        with_nan = cases.Layer(cases.coded(x, cases.U8), made.codes, made.scale, made.zero)
        assert np.isnan(run(with_nan, OUTS[0], backend)).all(1).tolist() == [False, True, False]
