import re

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import Q4_0, Q8_0
from lockstep.ops.rounded import fake_quant_cpu, grids
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import fold, num_bytes
from tests.ops.harness import same_bits
from tests.ops.rounded.test_fake_quant import run

RNG = np.random.default_rng(11)
W = (RNG.standard_normal((6, 64)) * np.exp2(RNG.integers(-4, 3, (6, 1)))).astype(np.float32)
W[3, 7] = 40  # an outlier: the best range of its row ends below it
W[4] = np.abs(W[4])
W[5] = 0
F32 = np.float32


def folded(text, values=W):
    return fold(values, Spec.parse(text), "L0.q.w")


def by_formula(x, bits, symmetric):
    """(codes, scale, zero) of numbers that share a grid, by the operations of the published formula."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    least, most = np.minimum(x.min(), F32(0)), np.maximum(x.max(), F32(0))
    if symmetric:
        scale, zero = np.maximum(np.maximum(-least, most) / F32(high), F32(1e-8)), F32(0)
    else:
        scale = np.maximum((most - least) / F32(high - low), F32(1e-8))
        zero = np.clip(np.rint(F32(low) - least / scale), F32(low), F32(high))
    return np.clip(np.rint(x * (F32(1) / scale)) + zero, low, high).astype(int), scale, zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("letter", "iu")
@pytest.mark.parametrize("per", ["tensor", "row", "32", "4"])
def test_integers_are_those_of_the_published_formula(letter, bits, per):
    made = folded(f"{letter}{bits}/{per}")
    parts = {"tensor": W.reshape(1, -1), "row": W}.get(per)
    parts = W.reshape(-1, int(per)) if parts is None else parts
    expected = [by_formula(part, bits, letter == "i") for part in parts]
    assert made.codes is not None and made.scale is not None and made.zero is not None
    shape = {"tensor": (1, 1), "row": (6, 1), "32": (6, 2), "4": (6, 16)}[per]
    assert made.scale.shape == made.zero.shape == shape and made.scale.dtype == made.zero.dtype == F32
    same_bits(made.scale.ravel(), np.array([e[1] for e in expected], F32))
    np.testing.assert_array_equal(made.zero.ravel(), [e[2] for e in expected])
    np.testing.assert_array_equal(made.codes.reshape(parts.shape), np.stack([e[0] for e in expected]))
    groups = made.codes.astype(F32).reshape(*shape, -1) if per != "tensor" else made.codes.astype(F32)[None]
    values = (groups - made.zero[..., None]) * made.scale[..., None]
    same_bits(made.values, values.reshape(W.shape))


@pytest.mark.parametrize("text, dtype", [("i2", np.int8), ("i8", np.int8), ("u7", np.int8), ("u8", np.int16)])
def test_codes_take_the_smallest_integers(text, dtype):
    codes, wide = folded(text).codes, folded("u16").codes
    assert codes is not None and codes.dtype == dtype
    assert wide is not None and wide.dtype == np.int32 and wide.max() == 65535


@pytest.mark.parametrize("text", ["i4", "u4", "i3/16", "i4/tensor", "fp4", "u8"])
def test_mse_loses_least_of_all_factors(text):
    spec, found = Spec.parse(text + ":mse").resolved(True), folded(text + ":mse")
    size = spec.per if isinstance(spec.per, int) else W.size if spec.per == "tensor" else W.shape[1]
    clipped = 0
    for x, values in zip(W.reshape(-1, size), found.values.reshape(-1, size), strict=True):
        errors = [float(np.sum((x.astype(float) - rounded(x, spec, i)) ** 2)) for i in range(80)]
        assert float(np.sum((x.astype(float) - values) ** 2)) == pytest.approx(min(errors), rel=1e-5)
        clipped += min(errors) < 0.99 * errors[0]
    assert clipped or text == "u8"


def rounded(x, spec, i):
    """A row rounded by the definition, with its range reduced by i hundredths."""
    factor = F32(100 - i) / F32(100)
    row, least, most = spec.what.row(), np.minimum(x.min(), F32(0)) * factor, np.maximum(x.max(), F32(0)) * factor
    high = row[grids.HIGH] if spec.what.is_integer else row[grids.LARGEST]
    scale = np.maximum(np.maximum(-least, most) / high, F32(1e-8))
    if not spec.symmetric:
        scale = np.maximum((most - least) / high, F32(1e-8))
        row[grids.ZERO_POINT] = np.clip(np.rint(-least / scale), F32(0), high)
    row[[grids.SCALE, grids.INVERSE]] = scale, F32(1) / scale
    made = x.copy()
    grids.quantize_row(made, row)
    return made.astype(float)


def test_a_tensor_that_is_one_number_is_exact_on_an_asymmetric_grid():
    for value, code in ((1.0, 1), (-0.7, 254), (0.0, 0)):
        w = np.full((1, 8), value, F32)
        for text in ("u8/tensor", "u8/tensor:mse"):
            made = folded(text, w)
            assert made.codes is not None and (made.codes == code).all()
            same_bits(made.values, w)
        assert (folded("u8/row", w).codes != code).all() or value == 0  # rows have no grids for constants


def test_small_floats_are_those_of_ml_dtypes():
    for text, dtype, largest in (("fp8", ml_dtypes.float8_e4m3fn, 448), ("fp4", ml_dtypes.float4_e2m1fn, 6)):
        made = folded(text)
        assert made.codes is None and made.zero is None and made.scale is not None and made.scale.shape == (6, 1)
        scale = np.maximum(np.abs(W).max(1, keepdims=True) / F32(largest), F32(1e-8))
        same_bits(made.scale, scale)
        floats = np.clip(W * (F32(1) / scale), -largest, largest).astype(dtype).astype(F32)
        np.testing.assert_array_equal(made.values, floats * scale)


@pytest.mark.parametrize("text", ["mxint8", "mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4"])
def test_blocks_are_those_of_activations(text):
    made, row = folded(text), Spec.parse(text).what.row()
    if text == "nvfp4":
        assert made.scale is not None and made.scale.shape == (1, 1)
        same_bits(made.scale[0, 0], np.abs(W).max() / F32(6 * 448))
        row[[grids.SCALE, grids.INVERSE]] = made.scale[0, 0], F32(1) / made.scale[0, 0]
    else:
        assert made.scale is None
    assert made.codes is None and made.zero is None
    same_bits(made.values, run(fake_quant_cpu.CPU, W, [row]))


def test_formats_of_the_engine_are_those_of_its_files():
    for text, packing in (("q8_0", Q8_0), ("q4_0", Q4_0)):
        same_bits(folded(text).values, packing.dequantize(packing.quantize(W)))
    with pytest.raises(ValueError, match=r"^L0\.q\.w: block scale .* does not fit float16"):
        folded("q8_0", np.full((1, 32), 1e30, F32))


def test_off_changes_nothing_and_no_fold_changes_its_input():
    before = W.copy()
    assert folded("off").values is W and folded("off").codes is None
    for text in ("i4:mse", "fp8", "mxfp4", "q4_0", "u4/tensor"):
        folded(text)
        same_bits(W, before)
        strided = np.asfortranarray(W)
        same_bits(folded(text, strided).values, folded(text).values)


@pytest.mark.parametrize(
    "text, values, message",
    [
        ("i4/24", W, "L0.q.w: rows of 64 weights are not a whole number of blocks of 24 (i4/24:minmax)"),
        ("mxfp4", W[:, :40].copy(), "L0.q.w: rows of 40 weights are not a whole number of blocks of 32 (mxfp4)"),
        ("q8_0", W[:, :40].copy(), "L0.q.w: rows of 40 weights are not a whole number of blocks of 32 (q8_0)"),
        ("nvfp4", W[:, :24].copy(), "L0.q.w: rows of 24 weights are not a whole number of blocks of 16"),
        ("i8", np.array([[1, np.nan, np.inf]], F32), "L0.q.w: 2 of 3 weights are NaN or infinite"),
        ("i8", W[0], "L0.q.w: a weight of float32 [64], expected float32 [N, K]"),
        ("i8", W.astype(float), "L0.q.w: a weight of float64 [6, 64], expected float32 [N, K]"),
        ("i8", W[:0], "L0.q.w: a weight of float32 [0, 64], expected float32 [N, K]"),
        ("u8", np.array([[-3e38, 3e38]], F32), "L0.q.w: weights from -3e+38 to 3e+38 have no scale in float32"),
        ("i8/head", W, "i8/head: a weight has no heads"),
    ],
)
def test_weights_that_have_no_such_grid_are_named(text, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        folded(text, values)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("off", 4 * 6 * 64),
        ("i8", 6 * 64 + 4 * 6),
        ("i4/tensor", 6 * 32 + 4),
        ("u4", 6 * 32 + 3 + 4 * 6),
        ("u4/32", 6 * 32 + 6 + 4 * 12),
        ("i3", 6 * 24 + 4 * 6),
        ("fp8", 6 * 64 + 4 * 6),
        ("mxfp4", 6 * 32 + 12),
        ("nvfp4", 6 * 32 + 24 + 4),
        ("q8_0", 12 * 34),
        ("q4_0", 12 * 18),
    ],
)
def test_bytes(text, expected):
    assert num_bytes(Spec.parse(text), (6, 64)) == expected
