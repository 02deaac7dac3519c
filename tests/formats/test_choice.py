"""The format in which a linear layer multiplies a tensor."""

import pytest

from lockstep.formats.choice import compute_format


@pytest.mark.parametrize(
    "stored, requested, width, chosen",
    [
        ("bf16", "auto", 64, "bf16"),
        ("f32", "auto", 64, "f32"),
        ("q5_k", "auto", 256, "q5_k"),
        ("f64", "auto", 64, "f32"),
        ("f8_e4m3", "auto", 64, "bf16"),
        ("f8_e5m2", "auto", 48, "f32"),
        ("bf16", "q8_0", 64, "q8_0"),
        ("bf16", "q8_0", 48, "f32"),
        ("bf16", "auto", 48, "f32"),
        ("f16", "auto", 48, "f16"),
        ("q4_1", "auto", 32, "q4_1"),
        ("q5_0", "auto", 96, "q5_0"),
        ("q5_1", "auto", 64, "q5_1"),
        ("q5_1", "q8_0", 64, "q8_0"),
        ("q4_k", "auto", 256, "q4_k"),
        ("q4_k", "auto", 288, "bf16"),
    ],
)
def test_format_of_a_linear_layer(stored, requested, width, chosen):
    assert compute_format(stored, requested, width) == chosen


def test_unknown_format_of_weights():
    with pytest.raises(ValueError, match="weights 'int4': expected one of auto, f32"):
        compute_format("bf16", "int4", 64)


@pytest.mark.parametrize("stored", ["i8", "u8", "i32", "i64", "bool", "f8_e8m0"])
@pytest.mark.parametrize("requested", ["auto", "q8_0"])
def test_integers_without_scales_are_no_weights(stored, requested):
    with pytest.raises(ValueError, match=f"tensor 'lm_head': format {stored} is not supported, only f32, f16, bf16"):
        compute_format(stored, requested, 64, "lm_head")
