"""Moving attention's scale into weights: which weights change, that codes stay, and that every path has the same
bits."""

import contextlib
import functools

import numpy as np
import pytest

from lockstep.ops import BACKENDS
from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.kv_cache import AttentionInputs
from lockstep.ops.sampling.score import NLL
from lockstep.ptq.fuse import fused
from lockstep.ptq.parts import ScaledTensor, fold_part
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import Treatment, rounded
from lockstep.ptq.solved import Solved
from lockstep.ptq.spec import Spec
from lockstep.ptq.treatment import sites_for, treatment_of
from lockstep.ptq.unroll import unroll
from lockstep.ptq.weights import fold
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.rig import Rig
from lockstep.weights.tensor import StoredTensor
from tests.ops.harness import same_bits
from tests.study.models import recorded, window

LENGTH = 40
RULES = (("*", "u8"), ("*.w", "u4/row"), ("*norm.w", "i8/tensor"), ("L*.k.all", "i8/head"))
F32 = np.float32


@pytest.fixture(scope="module")
def team():
    with contextlib.closing(Team(2)) as made:
        yield made


def scale_of(model):
    """Attention's scale, which is the same in all layers."""
    [scale] = {op.scale for op in model.recorded.ops if isinstance(op, Attention)}
    return scale


def seen(name, plan, team):
    """(sites, treatment, statistics from calibration) of a plan on a model."""
    model = recorded(name)
    sites = sites_for(model.recorded, plan)
    treatment = treatment_of(plan, sites, LENGTH)
    return sites, treatment, calibrate(model, treatment, team, [window(model, LENGTH, 3)[0]])


def scores(name, plan, team, change=lambda program: program, table=None):
    """Negative log-likelihoods of a window under a plan, calibrated on the same window. change: maps the program."""
    (sites, treatment, stats), model = seen(name, plan, team), recorded(name)
    rig = Rig(model, treatment, team, LENGTH, lambda made: change(made.program), table, compares=False)
    rig.set_grids(Solved.solve(plan, name, "", sites, stats).grids)
    rig.set_weights(plan.resolve(sites), plan.arithmetic)
    rig.load(*window(model, LENGTH))
    rig.run()
    return rig.scores()[:, NLL]


# ------------------------------------------------------------ bits


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("name", ["plain", "biased", "normed 16", "hybrid 16"])
def test_a_power_of_two_in_weights_changes_no_bit(name, arithmetic, team):
    """Codes, zero points and scores stay the same as without fusion: every range is multiplied exactly."""
    made = {into: scores(name, Plan(RULES, arithmetic=arithmetic, fuse_scale=into), team) for into in ("none", *"qk")}
    assert np.isfinite(made["none"]).all()
    for into in "qk":
        same_bits(made[into], made["none"])


@pytest.mark.parametrize("into", "qk")
@pytest.mark.parametrize("name", ["normed", "hybrid"])
def test_both_twins_and_the_definition_have_the_same_bits(name, into, team):
    """With heads of 32, the scale is no power of two."""
    found, rules = [], (("*", "i16"), *RULES[1:])
    for arithmetic in ("float", "integer"):
        plan = Plan(rules, arithmetic=arithmetic, fuse_scale=into, mask="additive")
        found.append(scores(name, plan, team))
        same_bits(scores(name, plan, team, unroll), found[-1])
        same_bits(scores(name, plan, team, table=BACKENDS["reference"]), found[-1])
    assert (found[0] != found[1]).any() and np.isfinite(found).all()


def test_a_scale_in_q_and_one_in_k_give_different_bits(team):
    one, other = (scores("normed", Plan(RULES, fuse_scale=into), team) for into in "qk")
    assert (one != other).any()


# ------------------------------------------------------------ which weights hold the scale


def near(name, into, team, change=lambda program: program):
    """Checks scores with nothing rounded, but attention taken apart, so that its scale is an operation of its own."""
    plan = Plan(fuse_scale=into, apart=["attention"])
    np.testing.assert_allclose(scores(name, plan, team, change), plain(name, team), atol=1e-4)


@functools.cache
def plain(name, team):
    return scores(name, Plan(apart=["attention"]), team)


@pytest.mark.parametrize("into", "qk")
@pytest.mark.parametrize("name", ["biased", "normed", "hybrid"])
def test_without_grids_only_roundings_differ(name, into, team):
    near(name, into, team)
    factor = scale_of(recorded(name))
    again = lambda program: program.rewritten(
        [op.changed(scale=factor) if op.kind == "rounded_attention" else op for op in program.ops]
    )
    with pytest.raises(AssertionError):
        near(name, into, team, again)


def check_ranges(stats, expected, into, factor):
    """Checks that ranges after a projection or norm that holds the scale are multiplied by it, and others are not."""
    for site, before in expected.items():
        own = site.split(".", 1)[1] if site.startswith("L") else site
        if own == "qk.raw":
            continue
        inner = own.startswith(f"{into}.") and own != "q.gate"
        scaled = inner or (own == into and f"{site}.norm" not in expected)
        for field in ("low", "high"):
            actual, scaled_bound = getattr(stats[site], field), getattr(before, field) * F32(factor if scaled else 1)
            np.testing.assert_allclose(actual, scaled_bound, rtol=1e-3, atol=1e-4, err_msg=site)


@pytest.mark.parametrize("name", ["biased", "normed", "hybrid"])
def test_ranges_of_queries_or_keys_are_multiplied(name, team):
    factor = scale_of(recorded(name))
    stats = {into: seen(name, Plan(RULES, fuse_scale=into), team)[2] for into in ("none", *"qk")}
    for into, other in ("qk", "kq"):
        assert stats["none"].keys() - stats[into].keys() == {s for s in stats["none"] if s.endswith(".qk.raw")}
        check_ranges(stats[into], stats["none"], into, factor)
        with pytest.raises(AssertionError):
            check_ranges(stats[other], stats["none"], into, factor)


def test_biases_are_multiplied_and_other_parts_are_as_they_were():
    before, after = recorded("biased").recorded, fused(recorded("biased").recorded, "k")
    changed = [(one, two) for one, two in zip(before.ops, after.ops, strict=True) if one is not two]
    assert [op.kind for op, _ in changed] == ["linear", "add_bias", "attention"] * 2
    for one, two in changed:
        if isinstance(one, Attention):
            assert two.scale == 1
            continue
        name = "bias" if one.kind == "add_bias" else "weight"
        parts, made = getattr(one, name).parts, getattr(two, name).parts
        assert (made[0] is parts[0], made[1] is parts[1], made[2] is parts[2]) == (True, False, True)
        same_bits(made[1].to_f32(), parts[1].to_f32() * F32(0.25))


@pytest.mark.parametrize("into", "qk")
def test_offsets_of_norms_are_in_their_weights(into):
    model = recorded("hybrid")
    programs = model.recorded, fused(model.recorded, into)
    [before], [after] = ([op for op in program.ops if isinstance(op, AttentionInputs)] for program in programs)
    assert (before.norm_offset, after.norm_offset) == (1.0, 0.0)
    factor = F32(scale_of(model))
    for name in "qk":
        [stored], [made] = (getattr(op, f"{name}_norm").parts for op in (before, after))
        own = factor if name == into else F32(1)
        same_bits(made.to_f32(), stored.to_f32() * own + own)


def test_there_is_no_scale_and_no_site_before_it():
    program, plan = recorded("plain").recorded, Plan((("L0.p", "u8"),), fuse_scale="q")
    sites = sites_for(program, plan)
    assert {s.name for s in sites_for(program, Plan())} - {s.name for s in sites} == {"L0.qk.raw", "L1.qk.raw"}
    with pytest.raises(ValueError, match=r"rule 'L0\.qk\.raw' = 'u8' matches no site"):
        Plan((("L0.qk.raw", "u8"),), fuse_scale="q").resolve(sites)
    twin = unroll(rounded(program, treatment_of(plan, sites, LENGTH)).program)
    made = [(op.kind, tensor.name) for op in twin.ops for tensor in op.outputs]
    assert not any(kind == "scale_rows" or ".qk.raw." in name for kind, name in made)
    assert sum(kind == "head_scores" and ".qk." in name for kind, name in made) == 8  # heads of two layers


# ------------------------------------------------------------ grids of weights

FACTOR = float(F32(32**-0.5))
VALUES = np.random.default_rng(8).standard_normal((6, 64)).astype(F32)
STORED = StoredTensor("k_proj", "f32", VALUES.shape, VALUES)
SCALED = ScaledTensor("k_proj", "f32", VALUES.shape, VALUES, FACTOR)


def check_rescaled(made, text):
    """Checks that codes and zero points are those of the weight alone, and its scale is multiplied by the factor."""
    alone = fold(VALUES, Spec.parse(text))
    same_bits(made.scale, alone.scale * F32(FACTOR))
    if alone.codes is None:
        np.testing.assert_allclose(made.values, alone.values * F32(FACTOR), rtol=2e-7)
        return
    np.testing.assert_array_equal(made.codes, alone.codes)
    np.testing.assert_array_equal(made.zero, alone.zero)
    groups = made.codes.reshape(*made.scale.shape, -1) if made.scale.size > 1 else made.codes[None, None]
    values = (groups.astype(F32) - made.zero[..., None]) * made.scale[..., None]
    same_bits(made.values, values.reshape(VALUES.shape))


@pytest.mark.parametrize(
    "text", ["i4", "u4/row:mse", "u8", "i16/tensor", "u3/16", "u4/tensor:mse", "fp8", "fp4/tensor"]
)
def test_grids_are_rescaled(text):
    check_rescaled(fold_part(SCALED, Spec.parse(text)), text)
    for wrong in (fold_part(STORED, Spec.parse(text)), fold(VALUES * F32(FACTOR), Spec.parse(text), "", FACTOR)):
        with pytest.raises(AssertionError):
            check_rescaled(wrong, text)


def test_a_grid_that_is_found_again_is_another():
    """A grid fitted to the multiplied numbers differs, because they are rounded before they are divided."""
    for text in ("i4", "u8", "u3/16"):
        with pytest.raises(AssertionError):
            check_rescaled(fold(VALUES * F32(FACTOR), Spec.parse(text)), text)


@pytest.mark.parametrize("text", ["mxint8", "mxfp4", "nvfp4", "q8_0", "q4_0", "off"])
def test_blocks_are_those_of_the_multiplied_numbers(text):
    same_bits(fold_part(SCALED, Spec.parse(text)).values, fold(VALUES * F32(FACTOR), Spec.parse(text)).values)


def test_numbers_that_are_not_finite_are_named():
    broken = VALUES.copy()
    broken[1, 2] = np.nan
    with pytest.raises(ValueError, match="tensor 'k_proj': expected finite weights, found 1 NaN or infinite"):
        fold_part(ScaledTensor("k_proj", "f32", broken.shape, broken, FACTOR), Spec.parse("i4"))


# ------------------------------------------------------------ what cannot be fused


def test_what_cannot_have_it_is_named():
    with pytest.raises(ValueError, match="is multiplied as bf16, and attention's scale goes into float32"):
        rounded(recorded("plain", "bf16").recorded, Treatment(sites=(), fuse_scale="k"))
    program = recorded("hybrid").recorded
    bare = lambda op: op.changed(q_norm=None, k_norm=None) if isinstance(op, AttentionInputs) else op
    gated = program.rewritten([bare(op) for op in program.ops])
    with pytest.raises(
        ValueError, match=r"fuse_scale is 'q', and model\.layers\.3\.self_attn\.qkv has no projection of q"
    ):
        fused(gated, "q")
    fused(gated, "k")


def test_a_scale_of_one_stays():
    once = fused(recorded("plain").recorded, "q")
    assert fused(once, "k").ops == once.ops and fused(once, "none") is once
