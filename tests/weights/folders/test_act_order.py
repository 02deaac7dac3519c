"""Folders in act-order: columns sorted by group are multiplied in integers, with rows sorted alike."""

import numpy as np
import pytest

from lockstep.lab.describe import memory
from lockstep.models.mtp import HeadRecorder
from lockstep.ops.elementwise.select_columns import SelectColumns
from lockstep.ops.linear.experts import ExpertLinear
from lockstep.ops.linear.linear import Linear
from lockstep.weights.folders.folder import unquantized
from lockstep.weights.rearranged import ScatteredColumns
from lockstep.weights.safetensors import open_file
from lockstep.weights.tensor import merge
from tests.models.cases import case
from tests.models.running import load, logits_of
from tests.weights.files import safetensors_bytes, write
from tests.weights.folders import forms
from tests.weights.folders.forms import FORMS, GPTQ, GROUP, quantized_model

N, K, NUM_LAYERS = 48, 192, 2
CONFIG = case("qwen3", hidden_size=128, intermediate_size=192, num_hidden_layers=NUM_LAYERS, head_dim=32)
OWN, ONE = "gptq in order of activations", "gptq in one order"
IDS = list(range(3, 40))


def opened(tmp_path, config, parts, name="lm_head"):
    """The weight of a file with one layer's parts."""
    path = write(tmp_path / "m.safetensors", safetensors_bytes({f"{name}.{k}": v for k, v in parts.items()}))
    return unquantized({"quantization_config": config}, merge([open_file(path)]))[f"{name}.weight"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {form: quantized_model(form, CONFIG, tmp_path_factory.mktemp("order")) for form in (OWN, ONE)}


def kinds(program):
    """The ops before and at each product of a layer, by what they write."""
    return [op.out.name for op in program.ops if isinstance(op, (SelectColumns, Linear)) and "layers.0." in op.out.name]


@pytest.mark.parametrize("form", ["gptq in order of activations", "packed in order of activations"])
def test_columns_are_sorted_by_group_and_stably(form, tmp_path):
    config, write_parts, _ = FORMS[form]
    parts, weights = write_parts(np.random.default_rng(0), N, K)
    tensor = opened(tmp_path, config, parts)
    group_of = next(parts[name] for name in ("g_idx", "weight_g_idx") if name in parts)
    expected = sorted(range(K), key=lambda k: (group_of[k], k))
    assert tensor.order.data.tolist() == [expected] and tensor.sorted.format == "group4"
    assert (tensor.sorted.to_f32(slice(5, 20)) == weights[5:20, expected]).all()


@pytest.mark.parametrize("form", [OWN, ONE])
def test_logits_are_those_of_the_definitions_on_every_path(form, folders):
    model = load(folders[form][0], "auto")
    expected = logits_of(model, IDS, base="reference", fused=False, num_threads=1).tobytes()
    for path in (dict(), dict(cuts=(1, 2, 20), num_threads=1), dict(base="per_token", fused=False, num_threads=1)):
        assert logits_of(model, IDS, **path).tobytes() == expected, path


def test_products_of_the_same_rows_in_the_same_order_share_the_sorted_rows(folders):
    own, one = (kinds(load(folders[form][0], "auto").recorded) for form in (OWN, ONE))
    assert len(one) == 4 + 4  # of queries, keys and values; of what they give; of gate and up; of down
    assert len(own) == 7 + 7
    assert [name.rpartition("layers.0.")[2] for name in one[:2]] == ["input_layernorm.sorted", "self_attn.qkv"]


@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_other_formats_multiply_the_columns_as_they_are(weights, folders):
    program = load(folders[OWN][0], weights).recorded
    assert not any(isinstance(op, SelectColumns) for op in program.ops)
    assert {weight.format for weight in program.weights() if "proj" in weight.name} == {weights}


def test_packed_bytes_are_those_of_a_folder_without_an_order(folders, tmp_path):
    plain, _ = quantized_model("gptq", CONFIG, tmp_path)
    found, expected = (memory(load(folder, "auto").recorded)["packed_weights"] for folder in (folders[OWN][0], plain))
    assert found == expected


SCATTERED = {
    "groups that are not whole": (GROUP, lambda rng: rng.integers(0, K // GROUP, K)),
    "groups of half a block": (16, lambda rng: rng.permutation(K) // 16),
}


@pytest.mark.parametrize("what", SCATTERED)
def test_groups_that_no_block_has_room_for_are_float32(what, tmp_path):
    group, made = SCATTERED[what]
    parts, _ = forms.gptq(4, group)(np.random.default_rng(1), N, K)
    codes, scales, zeros = forms.made_up(np.random.default_rng(1), N, K, 4, group)
    group_of = made(np.random.default_rng(2)).astype(np.int32)
    tensor = opened(tmp_path, GPTQ | {"group_size": group}, parts | {"g_idx": group_of})
    assert tensor.format == "f32" and not isinstance(tensor, ScatteredColumns)
    assert (tensor.to_f32() == (codes - zeros[:, group_of]) * scales.astype(np.float32)[:, group_of]).all()


def test_the_first_rows_of_a_head_share_its_memory(tmp_path):
    config, write_parts, _ = FORMS[OWN]
    tensor = opened(tmp_path, config, write_parts(np.random.default_rng(0), N, K)[0])
    ops = HeadRecorder({}, "", "auto", "f32", 64)
    ops.first_products(ops.program.give("hidden", "R", K), tensor, 16, "logits")
    select, linear = ops.program.ops
    assert isinstance(select, SelectColumns) and linear.x is select.out
    assert linear.weight.whole.parts == (tensor.sorted,) and linear.weight.format == "group4"


def test_experts_are_float32(tmp_path):
    config = case("qwen3_moe", hidden_size=128, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2)
    quantized, twin = quantized_model(OWN, config | {"num_hidden_layers": 1}, tmp_path)
    model = load(quantized, "auto")
    assert {op.weight.format for op in model.recorded.ops if isinstance(op, ExpertLinear)} == {"f32"}
    assert any(isinstance(op, SelectColumns) for op in model.recorded.ops)
    expected = logits_of(load(twin), IDS)
    assert np.square(logits_of(model, IDS) - expected).mean() < 0.05**2 * np.square(expected).mean()
