"""Sites of recorded programs, and that rounding them changes nothing else."""

import re

import numpy as np
import pytest

from lockstep.ops.attention.attention import Attention
from lockstep.ops.attention.kv_cache import AttentionInputs
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.inputs import RoundedInputs
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import INSIDE, Treatment, component, layer_of, rounded, sites_of
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.running import load
from tests.study.models import recorded


def names(sites, **fields):
    return {site.name for site in sites if all(getattr(site, name) == value for name, value in fields.items())}


def test_a_plain_layer_has_the_sites_that_rules_name():
    sites = sites_of(recorded("plain").recorded)
    layer = {name.removeprefix("L1.") for name in names(sites, layer=1)}
    projections = {"q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2"}
    assert layer >= projections | {f"{p}.w" for p in projections} | {"ctx", "mul", "res.attn", "res.mlp", "norm1.in"}
    inner = {name.removeprefix("L1.") for name in names(sites, layer=1, is_inner=True)}
    rotation = {f"{head}.{part}" for head in "qk" for part in ("x1", "x2", "cat", "cos", "sin", "rot")}
    assert inner == rotation | {"k.all", "v.all", "qk.raw", "qk", "p", "act.sig", "act"}
    masked = names(sites_of(recorded("plain").recorded, additive=True)) - names(sites)
    assert masked == {"L0.qk.masked", "L1.qk.masked"}
    outside = names(sites, layer=None)
    assert outside == {"embed", "embed.w", "norm", "norm.in", "norm.w", "head", "head.w", "rope.cos", "rope.sin"}


def test_a_hybrid_has_norms_of_heads_gates_and_the_delta_rule():
    sites = names(sites_of(recorded("hybrid").recorded))
    assert {"L3.q.norm", "L3.q.norm.w", "L3.q.gate", "L3.pv", "L0.delta", "L0.ctx", "L0.in_proj_qkv.w"} <= sites
    assert "L0.q" not in sites


def test_heads_and_widths_are_the_models():
    model = recorded("plain")
    by_name = {site.name: site for site in sites_of(model.recorded)}
    layer = model.config.layers[0]
    H, G, K = layer.mixer.num_heads, layer.mixer.num_kv_heads, layer.mixer.head_dim
    assert (by_name["L0.q"].heads, by_name["L0.q"].width) == (H, K)
    assert (by_name["L0.k.all"].heads, by_name["L0.k.all"].width) == (G, K)
    assert (by_name["L0.p"].heads, by_name["L0.p"].width) == (H, 0)
    assert (by_name["L0.mul"].heads, by_name["L0.mul"].width) == (1, layer.mlp.width)


def test_a_program_without_sites_is_the_recorded_one():
    program = recorded("plain").recorded
    made = rounded(program, Treatment(sites=()))
    assert made.program.ops == program.ops and not made.grids


def test_boundary_sites_leave_every_op_as_it_is():
    program = recorded("plain").recorded
    made = rounded(program, Treatment(sites={"L0.q", "L1.o", "norm"}))
    added = [op for op in made.program.ops if isinstance(op, FakeQuant)]
    assert [op for op in made.program.ops if op not in added] == program.ops
    assert {op.grids.name for op in added} == {"L0.q", "L1.o", "norm"} == set(made.grids)
    assert len(added) == 4  # the final norm occurs twice: for rows that sample, and for rows that are embedded


def test_what_is_taken_apart_is_taken_apart_in_every_layer():
    program = recorded("plain").recorded
    made = rounded(program, Treatment(sites=(), inside=INSIDE)).program
    count = lambda kind: sum(isinstance(op, kind) for op in made.ops)
    layers = sum(isinstance(op, Attention) for op in program.ops)
    assert [count(kind) for kind in (RoundedInputs, RoundedAttention, RoundedSiluMul)] == [layers] * 3
    assert count(Attention) == 0


def test_grids_of_a_site_are_where_the_kernels_read_them():
    made = rounded(recorded("plain").recorded, Treatment(inside=INSIDE))
    made.grids["L0.p"][...] = 7
    [op] = [op for op in made.program.ops if isinstance(op, RoundedAttention) and "layers.0." in op.out.name]
    H = op.num_heads
    assert (op.grids.values[3 * H : 4 * H] == 7).all() and (op.grids.values[: 3 * H] == 0).all()
    assert not made.grids["L1.p"].any()


def test_an_inner_site_of_what_is_whole_is_refused():
    with pytest.raises(ValueError, match=r"site 'L0.p': the program has none of this name with \(\) taken apart"):
        rounded(recorded("plain").recorded, Treatment(sites={"L0.p"}))
    with pytest.raises(ValueError, match=r"layer 0: sites inside attention need a cache of float32, .* is bf16"):
        rounded(recorded("plain", kv_dtype="bf16").recorded, Treatment(inside=("attention",)))


def test_weights_are_parts_of_what_the_program_reads():
    model = recorded("plain")
    made = rounded(model.recorded, Treatment(sites=()))
    [part] = made.weights["L0.k.w"]
    assert part.weight.parts[part.index].name.endswith("layers.0.self_attn.k_proj.weight") and part.index == 1
    values = {name: parts[0].weight.parts[parts[0].index].shape for name, parts in made.weights.items()}
    assert values["head.w"] == (model.config.vocab_size, model.config.hidden_size)
    assert np.prod(values["norm.w"]) == model.config.hidden_size


@pytest.mark.parametrize(
    "name, short",
    [
        ("model.layers.3.self_attn.q_proj.weight", "q"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.3.mlp.gate_proj.weight", "gate"),
        ("model.norm.weight", "norm"),
        ("model.layers.0.linear_attn.in_proj_qkv.weight", "in_proj_qkv"),
    ],
)
def test_components(name, short):
    assert component(name) == short


def test_attention_with_sinks_stays_as_it_is(tmp_path):
    """Taken apart, it would lose them."""
    config = CASES["gpt_oss"]
    program = load(tiny.write(tmp_path, config, tiny.tensors(config, 1)), kv_dtype="f32").recorded
    made = rounded(program, Treatment(inside=INSIDE)).program
    found = [[op.sinks for op in ops if isinstance(op, Attention)] for ops in (made.ops, program.ops)]
    assert found[0] == found[1] and len(found[0]) == 3 and None not in found[0]


@pytest.mark.parametrize("name", ["window", "some windows"])
def test_attention_with_a_window_has_no_sites_inside_and_all_others(name):
    program = recorded(name).recorded
    sites = sites_of(program)
    windowed = {layer_of(op.out.name) for op in program.ops if isinstance(op, Attention) and op.window}
    names = {f"L{layer}.{site}" for layer in windowed for site in ("ctx", "q", "o.w", "mul", "down")}
    assert windowed and names <= {site.name for site in sites}
    within = {site.layer for site in sites if site.is_inner and "act" not in site.name and site.layer is not None}
    assert not within & windowed and (within if name == "some windows" else not within)
    made = rounded(program, Treatment(inside=INSIDE))
    assert {layer_of(op.out.name) for op in made.program.ops if isinstance(op, Attention)} == windowed
    with pytest.raises(ValueError, match=r"attention with a window, a soft cap or sinks has no sites inside"):
        Plan([(f"L{min(windowed)}.qk", "u8")]).resolve(sites)


INPUTS = "inputs of attention with a window, with norms over all heads at once or with a rope of the queries' own"
WHOLE = {
    "olmo2": ("inputs", "L0.q.cos", INPUTS),
    "ministral3": ("inputs", "L1.v.all", INPUTS),
    "gemma3": ("swiglu", "L2.act.sig", "a gated product without SiLU has no sites inside"),
    "gpt_oss": ("attention", "L0.p", "attention with a window, a soft cap or sinks has no sites inside"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_no_op_rounds_is_refused_by_name(name, tmp_path):
    """By rules that name it and by `apart`; a rule for everything leaves it out, and its ops stay as they are."""
    group, site, said = WHOLE[name]
    config = CASES[name]
    program = load(tiny.write(tmp_path, config, tiny.tensors(config, 1)), kv_dtype="f32").recorded
    sites = sites_of(program)
    for plan in (Plan([(site, "u8")]), Plan(apart=[group])):
        with pytest.raises(ValueError, match=re.escape(said)):
            plan.resolve(sites)
    everything = Plan([("*", "i16")]).resolve(sites)
    assert everything and site not in everything
    kinds = (AttentionInputs, Attention, GatedMul)
    kept = [op for op in rounded(program, Treatment(sites=(), inside=(group,))).program.ops if isinstance(op, kinds)]
    assert kept == [op for op in program.ops if isinstance(op, kinds)]
