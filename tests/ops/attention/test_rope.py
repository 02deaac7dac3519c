"""Rotary position embedding: frequencies are those of transformers, tables and rotation are accurate."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.attention import rope
from lockstep.ops.attention.rope import RopeScaling
from tests.ops.harness import same_bits

# every fifth inverse frequency of 32, and the attention factor, from transformers 5.23.0 (ROPE_INIT_FUNCTIONS, float32)
RECORDED = {
    "default": (
        1e7,
        RopeScaling(),
        1.0,
        [
            1.0,
            0.08058421313762665,
            0.006493816617876291,
            0.0005232990952208638,
            4.216965317027643e-05,
            3.398208264115965e-06,
            2.7384197665014653e-07,
        ],
    ),
    "linear": (
        1e4,
        RopeScaling("linear", 4.0),
        1.0,
        [
            0.25,
            0.05928434059023857,
            0.014058532193303108,
            0.0033338037319481373,
            0.0007905694656074047,
            0.00018747354624792933,
            4.4456985051510856e-05,
        ],
    ),
    "llama3": (
        5e5,
        RopeScaling("llama3", 8.0),
        1.0,
        [
            1.0,
            0.12868738174438477,
            0.016560440883040428,
            0.0013718936825171113,
            3.428102354519069e-05,
            4.411534519022098e-06,
            5.677088097399974e-07,
        ],
    ),
    "yarn": (
        1e6,
        RopeScaling("yarn", 4.0, original_max_position_embeddings=32768),
        1.138629436111989,
        [
            1.0,
            0.11547820270061493,
            0.01333521492779255,
            0.001026617712341249,
            4.4456985051510856e-05,
            5.133812464919174e-06,
            5.928434347879374e-07,
        ],
    ),
    "longrope": (
        1e4,
        RopeScaling(
            "longrope",
            32.0,
            original_max_position_embeddings=4096,
            factors=tuple(1 + 0.75 * i for i in range(32)),
        ),
        float(np.float32(1.1902380714238083)),
        [
            1.0,
            0.04992365464568138,
            0.0066157798282802105,
            0.0010885889641940594,
            0.00019764236640185118,
            3.7969326513120905e-05,
            7.567146894871257e-06,
        ],
    ),
    "yarn, everything set": (
        1e4,
        RopeScaling(
            "yarn",
            40.0,
            original_max_position_embeddings=4096,
            mscale=1.0,
            mscale_all_dim=0.707,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
        ),
        1.0857263992561355,
        [
            1.0,
            0.23713736236095428,
            0.05623412877321243,
            0.009520861320197582,
            0.00012395245721563697,
            1.8747354260995053e-05,
            4.445698323252145e-06,
        ],
    ),
}


def complete_tables(num_positions, rope_dim, theta, *scaling):
    """The tables (cos, sin) of num_positions positions."""
    tables = rope.RopeTables(num_positions, rope_dim, theta, *scaling)
    tables.cover(num_positions)
    return tables.cos_PR, tables.sin_PR


@pytest.mark.parametrize("name", RECORDED)
def test_frequencies_are_those_of_transformers(name):
    theta, scaling, factor, recorded = RECORDED[name]
    np.testing.assert_allclose(rope.inverse_frequencies(64, theta, scaling)[::5], recorded, rtol=1e-6)
    assert abs(rope.attention_factor(scaling) - factor) < 1e-12


def test_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="dynamic"):
        rope.inverse_frequencies(64, 1e4, RopeScaling("dynamic"))


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling("yarn", 4.0)])
def test_tables_are_accurate_far_out(scaling):
    cos, sin = complete_tables(1 << 18, 4, 1e4, scaling)
    far = np.r_[0:300, (1 << 18) - 300 : 1 << 18]
    angle = far[:, None] * rope.inverse_frequencies(4, 1e4, scaling).astype(np.float64)
    for table, exact in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        exact = exact * rope.attention_factor(scaling)
        assert (np.abs(table[far] - exact) <= 0.5001 * np.spacing(np.abs(exact).astype(np.float32))).all()


def test_table_compiled_equals_interpreted():
    frequency = rope.inverse_frequencies(8, 1e4)
    tables = np.full((2, 2, 40, 4), np.nan, np.float32)
    factors = np.linspace(1, 2, 40)
    rope.fill_table(frequency, factors, 5, *tables[0])
    interpreted(rope.fill_table)(frequency, factors, 5, *tables[1])
    same_bits(tables[0], tables[1])


@pytest.mark.parametrize("cuts", [[1, 511, 512, 513, 700, 3000], [2900], [5, 5, 4, 3000]])
def test_rows_are_the_same_however_far_the_table_went_before(cuts):
    whole = complete_tables(3000, 8, 1e4, RopeScaling("yarn", 4.0))
    tables = rope.RopeTables(3000, 8, 1e4, RopeScaling("yarn", 4.0))
    for cut in cuts:
        tables.cover(cut)
        assert cut <= tables.num_covered <= min(3000, max(cuts) + 511)
        same_bits(tables.cos_PR[:cut], whole[0][:cut])
        same_bits(tables.sin_PR[:cut], whole[1][:cut])
        assert not tables.cos_PR[tables.num_covered :].any()


def test_queries_grow_with_their_position():
    tables = rope.RopeTables(600, 8, 1e4, growth=rope.Growth(0.1, 64))
    tables.cover(1)
    tables.cover(600)
    plain, factors = complete_tables(600, 8, 1e4), 1 + 0.1 * np.log(1 + np.arange(600) // 64)
    for found, want in zip((tables.cos_PR, tables.sin_PR), plain, strict=True):
        same_bits(found[:64], want[:64])
        np.testing.assert_allclose(found, want * factors[:, None], rtol=2e-7)


def test_rotation():
    rng = np.random.default_rng(0)
    x, (cos, sin) = rng.standard_normal(12, np.float32), (t[7] for t in complete_tables(8, 8, 1e4))
    out, slow = np.full((2, 12), np.nan, np.float32)
    rope.rotate(x, cos, sin, out)
    interpreted(rope.rotate)(x, cos, sin, slow)
    same_bits(out, slow)
    turned = (x[:4] + 1j * x[4:8]) * (cos + 1j * sin)
    np.testing.assert_allclose(out, np.r_[turned.real, turned.imag, x[8:]], rtol=0, atol=1e-6)
