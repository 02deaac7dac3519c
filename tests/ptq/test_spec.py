import numpy as np
import pytest

from lockstep.ops.rounded import grids
from lockstep.ptq.spec import GRIDS, Spec
from tests.ops.rounded.grid_cases import GRIDS as CASES

TEXTS = """
    i2 i8 i16 u2 u4 u16 fp8 fp8_e5m2 fp4 mxint8 mxfp8 mxfp8_e5m2 mxfp4 nvfp4 q8_0 q4_0 off i8/tensor i8/head u8/row
    u4/32 i4/128:mse u8/head:p99.99 u4/row:mse i8:minmax fp8/row:mse fp4/head nvfp4/head:p99 i16:p100 i8:p50.5
""".split()


@pytest.mark.parametrize("text", TEXTS)
def test_a_spec_is_its_text(text):
    spec = Spec.parse(text)
    assert str(spec) == text
    assert Spec.parse(str(spec)) == spec


def test_one_percentage_is_one_spec():
    assert Spec.parse("i8:p99.900") == Spec.parse("i8:p99.9")
    assert Spec.parse("i8:p099.9").percentile == 99.9
    assert Spec.parse("i8:mse").percentile is None


@pytest.mark.parametrize("bits", range(2, 17))
def test_ranges_of_integers(bits):
    for word, low, high in ((f"i{bits}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (f"u{bits}", 0, 2**bits - 1)):
        spec = Spec.parse(word)
        assert (spec.what.low, spec.what.high, spec.bits, spec.symmetric) == (low, high, bits, word[0] == "i")
        row = spec.what.row()
        assert row[[grids.KIND, grids.LOW, grids.HIGH]].tolist() == [grids.INTEGER, low, high]


def test_rows_are_those_of_kernels():
    for word, case in dict(mxint8="mxint8", mxfp8_e5m2="mxfp8_e5m2", mxfp4="mxfp4", q8_0="q8", off="off").items():
        expected = CASES[case].copy()
        expected[[grids.SCALE, grids.INVERSE]] = 0  # what microscaled kernels do not read
        np.testing.assert_array_equal(GRIDS[word].row(), expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "'' is no grid of a plan; expected grid"),
        ("i8:", "'i8:' is no grid of a plan"),
        ("i8 /row", "'i8 /row' is no grid of a plan"),
        (8, "8 is no grid of a plan"),
        ("i1", "'i1' is no grid; there are i2 .. i16, u2 .. u16, fp8"),
        ("i17", "'i17' is no grid"),
        ("int8", "'int8' is no grid"),
        ("i8/channel", "i8/channel: 'channel' is nothing that has a grid of its own; expected one of /tensor"),
        ("i8/1", "i8/1: a group of 1 columns, expected 2 to 1048576"),
        ("fp8/32", "fp8/32: groups of columns are for integers"),
        ("mxfp4/row", "mxfp4/row: mxfp4 has a scale for each 32 numbers and nothing else; expected mxfp4"),
        ("off/row", "off/row: off has no scale and nothing else"),
        ("mxfp8:mse", "mxfp8:mse: mxfp8 has no range that an observer would find; expected mxfp8"),
        ("nvfp4:mse", "nvfp4:mse: mse is for grids without blocks of their own"),
        ("i8:max", "i8:max: 'max' is no observer; expected minmax, mse or a percentile above 50 and up to 100"),
        ("i8:p50", "'p50' is no observer"),
        ("i8:p100.1", "'p100.1' is no observer"),
        ("i8:p-1", "'i8:p-1' is no grid of a plan"),
        ("i8:pnan", "'pnan' is no observer"),
    ],
)
def test_what_is_no_spec_is_named(text, message):
    with pytest.raises(ValueError) as raised:
        Spec.parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "text, activation, weight",
    [
        ("i8", "i8/tensor:minmax", "i8/row:minmax"),
        ("u4:mse", "u4/tensor:mse", "u4/row:mse"),
        ("i8/row", "i8/row", "i8/row:minmax"),
        ("i8/tensor", "i8/tensor:minmax", "i8/tensor:minmax"),
        ("fp8", "fp8/tensor:minmax", "fp8/row:minmax"),
        ("nvfp4", "nvfp4/tensor:minmax", "nvfp4/tensor:minmax"),
        ("mxfp4", "mxfp4", "mxfp4"),
        ("off", "off", "off"),
        ("i8/head:p99", "i8/head:p99", "i8/head:p99: a weight has no heads; expected /tensor, /row or columns"),
        ("i8:p99", "i8/tensor:p99", "i8:p99: a weight's range is found by minmax or mse, not by a percentile"),
        (
            "nvfp4/row",
            "nvfp4/row: only integers take a scale from the row",
            "nvfp4/row: a weight on nvfp4 has one scale",
        ),
        ("fp8/row", "fp8/row: only integers take a scale from the row itself; expected", "fp8/row:minmax"),
        ("i8/row:mse", "i8/row:mse: a row's range comes from the row itself; expected i8/row", "i8/row:mse"),
        ("i4/32", "i4/32: groups of columns are for weights; an activation has", "i4/32:minmax"),
        ("q4_0", "q4_0: q4_0 is a format of weights; expected i2", "q4_0"),
    ],
)
def test_what_is_usual_depends_on_the_tensor(text, activation, weight):
    for is_weight, expected in ((False, activation), (True, weight)):
        spec = Spec.parse(text)
        if ": " in expected:
            with pytest.raises(ValueError) as raised:
                spec.resolved(is_weight)
            assert expected in str(raised.value)
        else:
            resolved = spec.resolved(is_weight)
            assert str(resolved) == expected
            assert resolved.resolved(is_weight) == resolved
