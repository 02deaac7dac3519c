"""Qwen models with experts: their configs, a shared expert and its gate, stacked tensors; mistakes are seen."""

import numpy as np
import pytest

from lockstep.models.families.qwen import qwen3_next
from lockstep.models.model_config import Experts, LinearAttention, Mlp, Rope
from lockstep.models.registry import model_config
from lockstep.ops.linear.experts import ExpertLinear
from lockstep.ops.linear.moe import CombineExperts
from tests.golden.record_models import GOLDEN
from tests.models import tiny
from tests.models.cases import CASES, SEED, hybrid_experts, next_hybrid
from tests.models.published import qwen as p
from tests.models.running import load, logits_of
from tests.models.test_mutations import is_red, mapped, params, run


def test_published_configs():
    made = model_config(p.QWEN3_5_35B_A3B)
    assert [layer.kind for layer in made.layers] == (["linear attention"] * 3 + ["attention"]) * 10
    assert {layer.mlp for layer in made.layers} == {Experts(256, 8, 512, True, shared_width=512)}
    assert made.layers[0].mixer == LinearAttention(16, 32, 128, 128, 4)
    attention = made.layers[3].mixer
    assert (attention.num_heads, attention.num_kv_heads, attention.rope) == (16, 2, Rope(64, 1e7))
    assert made.mtp_layers == made.layers[3:4] and not made.tied and made.eos_ids == (248044,)


def test_published_config_of_qwen3_next():
    made = model_config(p.QWEN3_NEXT_80B_A3B)
    assert [layer.kind for layer in made.layers] == (["linear attention"] * 3 + ["attention"]) * 12
    assert {layer.mlp for layer in made.layers} == {Experts(512, 10, 512, True, shared_width=512)}
    assert made.layers[0].mixer == LinearAttention(16, 32, 128, 128, 4)
    assert made.layers[3].mixer.rope == Rope(64, 1e7) and made.mtp_layers == made.layers[3:4]


def test_layers_of_qwen3_next_without_experts():
    made = model_config(next_hybrid(decoder_sparse_step=2, mlp_only_layers=[3]))
    assert [layer.mlp for layer in made.layers] == [Mlp(80), made.layers[1].mlp, Mlp(80), Mlp(80)]
    assert made.layers[1].mlp == made.mtp_layers[0].mlp == Experts(16, 3, 32, True, shared_width=48)


def test_expert_weights_always_sum_to_one():
    """As in transformers, which has no key for it."""
    for value in (True, False):
        assert model_config(hybrid_experts(norm_topk_prob=value)) == model_config(hybrid_experts())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(shared_expert_intermediate_size=40), "experts of width 40 are not supported"),
        (dict(shared_expert_intermediate_size=None), "'shared_expert_intermediate_size': expected a number, got None"),
        (dict(num_experts_per_tok=17), "'num_experts_per_tok': expected at most 16, got 17"),
        (dict(num_experts=1 << 20), "'num_experts': expected 1 to 4096"),
        (dict(mlp_only_layers=[1]), "'mlp_only_layers': [1] is not supported"),
        (dict(routed_scaling_factor=2.5), "'routed_scaling_factor' (value 2.5) is not supported"),
        (dict(output_gate_type="sigmoid"), "'output_gate_type': 'sigmoid' is not supported, only 'silu' or 'swish'"),
    ],
    ids=str,
)
def test_refused(changes, message):
    with pytest.raises(ValueError) as raised:
        model_config(hybrid_experts(**changes))
    assert message in str(raised.value)


# ------------------------------------------------------------ stacked tensors


def stacked(arrays, transposed=False):
    """A checkpoint whose experts are stacked: gate above up in one tensor [E, 2 I, D], down in another."""
    made, experts = {}, {}
    for name, array in arrays.items():
        before, found, rest = name.partition(".mlp.experts.")
        if not found:
            made[name] = array
            continue
        index, part, _ = rest.split(".")
        experts.setdefault(before, {}).setdefault(part, {})[int(index)] = array
    for before, parts in experts.items():
        gate, up, down = (np.stack([parts[f"{n}_proj"][e] for e in sorted(parts[f"{n}_proj"])]) for n in NAMES)
        for name, stack in (("gate_up_proj", np.concatenate([gate, up], 1)), ("down_proj", down)):
            stack = np.ascontiguousarray(stack.swapaxes(1, 2)) if transposed else stack
            made[f"{before}.mlp.experts.{name}"] = stack
    return made


NAMES = ("gate", "up", "down")


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_5_moe_nested", "qwen3_moe_some_dense"])
@pytest.mark.parametrize("weights, dtype", [("f32", "F32"), ("auto", "BF16"), ("q8_0", "F16")])
def test_stacked_experts_are_the_experts_one_by_one(name, weights, dtype, tmp_path):
    config, arrays = CASES[name], tiny.tensors(CASES[name], SEED)
    assert not any(".experts.0." in n for n in stacked(arrays))
    ids = tiny.prompt(config, 20)
    paths = [tiny.write(tmp_path / n, config, a, dtype) for n, a in (("one", arrays), ("all", stacked(arrays)))]
    one, all_ = (logits_of(load(path, weights), ids) for path in paths)
    assert np.isfinite(one).all() and one.tobytes() == all_.tobytes()


def test_a_stack_is_one_part_of_a_weight(tmp_path):
    config = CASES["qwen3_5_moe"]
    model = load(tiny.write(tmp_path, config, stacked(tiny.tensors(config, SEED))))
    weights = [op.weight for op in model.recorded.ops if isinstance(op, ExpertLinear)]
    assert {len(weight.parts) for weight in weights} == {1} and weights[0].shape == (16 * 2 * 32, 64)


@pytest.mark.parametrize("shape, told", [((15, 64, 64), [16, 64, 64]), ((16, 32, 64), [16, 64, 64])])
def test_a_stack_of_another_shape_is_named(shape, told, tmp_path):
    config, name = CASES["qwen3_5_moe"], "model.layers.2.mlp.experts.gate_up_proj"
    arrays = stacked(tiny.tensors(config, SEED)) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError) as raised:
        load(tiny.write(tmp_path, config, arrays))
    assert str(raised.value) == f"tensor '{name}': expected shape {told}, found {list(shape)}"


def test_experts_in_both_forms_are_refused(tmp_path):
    config, arrays = CASES["qwen3_5_moe"], tiny.tensors(CASES["qwen3_5_moe"], SEED)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(ValueError, match=f"tensor '{name}' .* is not used"):
        load(tiny.write(tmp_path, config, stacked(arrays) | {name: arrays[name]}))


# ------------------------------------------------------------ mistakes


def shared_expert(**changes):
    """A change of the op that adds the shared expert."""
    return lambda op: op.changed(**changes) if isinstance(op, CombineExperts) else op


OPS = {
    "no shared expert": shared_expert(shared_y=None, gates=None),
    "the logit of an expert as the gate of the shared one": shared_expert(gate_column=0),
    "experts not renormalised beside the shared one": params(["route"], renormalise=False),
}
WEIGHTS = {
    "no gate of the shared expert": {"shared_expert_gate": lambda a, c: np.zeros_like(a)},
    "gate and up of the shared expert swapped": {
        "shared_expert.gate_proj": "shared_expert.up_proj",
        "shared_expert.up_proj": "shared_expert.gate_proj",
    },
}


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.mark.parametrize("mistake", OPS)
def test_a_mistake_in_the_program_is_seen(mistake, golden, tmp_path):
    is_red(run(tmp_path, "qwen3_5_moe", ops=OPS[mistake]), golden, "qwen3_5_moe")


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_is_seen(mistake, golden, tmp_path):
    arrays, changes = tiny.tensors(CASES["qwen3_5_moe"], SEED), WEIGHTS[mistake]
    changed = {n: to(a, arrays, n, {}) if (to := mapped(n, changes)) else a for n, a in arrays.items()}
    assert any(changed[n] is not arrays[n] for n in arrays)
    is_red(run(tmp_path, "qwen3_5_moe", changed), golden, "qwen3_5_moe")


# ------------------------------------------------------------ Qwen3-Next's fused projections

columns_of = qwen3_next.columns_of
SPLITS = {
    "values and their gates swapped": lambda rows, *w: swapped(columns_of(rows, *w), 2, 3),
    "queries and keys swapped": lambda rows, *w: swapped(columns_of(rows, *w), 0, 1),
    "b and a swapped": lambda rows, *w: swapped(columns_of(rows, *w), -2, -1) if len(w) == 2 else columns_of(rows, *w),
    "rows read as if they were not grouped": lambda rows, *w: columns_of(
        rows.reshape(1, -1), *(len(rows) * n for n in w)
    ),
}


def swapped(parts, first, second):
    """The parts with two of them swapped, if there are as many."""
    if len(parts) > max(first, second):
        parts[first], parts[second] = parts[second], parts[first]
    return parts


@pytest.mark.parametrize("mistake", SPLITS)
def test_a_wrong_order_of_rows_is_seen(mistake, golden, tmp_path, monkeypatch):
    monkeypatch.setattr(qwen3_next, "columns_of", SPLITS[mistake])
    is_red(run(tmp_path, "qwen3_next", ops=lambda op: op), golden, "qwen3_next")


def test_experts_of_qwen3_next_renormalised_by_mistake_are_seen(golden, tmp_path):
    name = "qwen3_next_not_renormalised"
    is_red(run(tmp_path, name, ops=params(["route"], renormalise=True)), golden, name)
