"""Folders of MLX, whose names, stacks and norms are its own, compute the bits of the folders that they were made of."""

import json

import numpy as np
import pytest

from lockstep.models.families.granitemoe import one_by_one
from lockstep.weights.folders.folder import unquantized
from lockstep.weights.safetensors import open_file
from lockstep.weights.tensor import merge
from tests.models import tiny
from tests.models.cases import CASES, EXPERTS
from tests.models.running import load, logits_of
from tests.models.test_gpt_oss import BLOCKS, with_blocks
from tests.weights.files import safetensors_bytes, with_header, write, write_folder
from tests.weights.folders import forms
from tests.weights.folders.test_folders import MLX, NAME, K, N, opened, same

SEED = 11
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight", "_norm.weight")


def stacked(arrays, owner, other):
    """Experts that are one by one, or gate and up in one stack, as three stacks below `other`."""
    made, stacks = {}, {}
    for name, array in arrays.items():
        place, mark, rest = name.partition(f".{owner}.")
        if not mark or ("proj" not in rest and "linear" not in rest):
            made[name] = array
        elif rest.split(".")[0].isdigit():
            stacks.setdefault(f"{place}.{other}.{rest.split('.', 1)[1]}", []).append(array)
        else:
            parts = np.split(array, 2, axis=1) if "up" in rest or "input" in rest else [array]
            names = EXPERT_PARTS[:2] if len(parts) == 2 else EXPERT_PARTS[2:]
            made |= {f"{place}.{other}.{n}.weight": np.ascontiguousarray(p) for n, p in zip(names, parts, strict=True)}
    return made | {name: np.stack(each) for name, each in stacks.items()}


def as_qwen(arrays):
    """Taps of convolutions last but one, norms that are added to 1 already."""
    made = {}
    for name, array in arrays.items():
        if "conv1d" in name:
            array = np.ascontiguousarray(array.swapaxes(1, 2))
        elif name.endswith(NORMS) and array.ndim == 1 and "linear_attn" not in name:
            array = array + np.float32(1)
        made[name] = array
    return made


def granite_experts(arrays):
    return stacked(arrays, "block_sparse_moe", "block_sparse_moe.switch_mlp")


FOLDERS = {
    "qwen3_moe": lambda arrays: stacked(arrays, "mlp.experts", "mlp.switch_mlp"),
    "qwen3_5": as_qwen,
    "qwen3_5_moe": lambda arrays: stacked(as_qwen(arrays), "mlp.experts", "mlp.switch_mlp"),
    "granitemoe": granite_experts,
}


def same_bits(config, usual, other, weights="f32"):
    models, ids = [load(folder, weights) for folder in (usual, other)], tiny.prompt(config, 30)
    return logits_of(models[0], ids).tobytes() == logits_of(models[1], ids).tobytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_floats(name, tmp_path):
    arrays, config = tiny.tensors(CASES[name], SEED), CASES[name]
    made = FOLDERS[name](arrays)
    assert {key: array.shape for key, array in made.items()} != {key: array.shape for key, array in arrays.items()}
    usual = write_folder(tmp_path / "usual", arrays, **config)
    assert same_bits(config, usual, write_folder(tmp_path / "mlx", made, **config))


def test_experts_of_gemma_4(tmp_path):
    arrays = tiny.tensors(EXPERTS, SEED)
    usual = write_folder(tmp_path / "usual", arrays, **EXPERTS)
    made = stacked(arrays, "experts", "experts.switch_glu")
    assert any("switch_glu.up_proj" in name for name in made)
    assert same_bits(EXPERTS, usual, write_folder(tmp_path / "mlx", made, **EXPERTS))


def test_gpt_oss_with_blocks_and_other_layers_of_8_bits(tmp_path):
    """The experts in mode mxfp4, under names of their own, gate and up apart, each with settings of its own."""
    arrays, made, own = with_blocks(SEED)[0], {}, {}
    for name, array in arrays.items():
        stem, _, suffix = name.rpartition("_proj_")
        if ".experts." not in name:
            made[name] = array
            continue
        parts = [array[:, first::2] for first in (0, 1)] if stem.endswith("gate_up") else [array]
        for part, each in zip(("gate", "up") if len(parts) == 2 else ("down",), parts, strict=True):
            path, each = f"{stem.rpartition('.')[0]}.{part}_proj", np.ascontiguousarray(each)
            if suffix == "blocks":
                made[f"{path}.weight"] = each.reshape(*each.shape[:2], -1).view(np.uint32)
                own[path] = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
            else:
                made[f"{path}.{suffix}"] = each
    config = {key: value for key, value in BLOCKS.items() if key != "quantization_config"}
    quantization = {"bits": 8, "group_size": 64, "mode": "affine", **own}
    usual = write_folder(tmp_path / "usual", arrays, **BLOCKS)
    mlx = write_folder(
        tmp_path / "mlx", made, **config, quantization=quantization, quantization_config=quantization
    )  # fmt: skip
    assert same_bits(BLOCKS, usual, mlx, "auto")


def test_settings_of_a_layer_do_not_take_the_mode_of_the_others(tmp_path):
    parts, weights = forms.mlx(8)(np.random.default_rng(3), N, K)
    tensors = opened(tmp_path, MLX | {"mode": "mxfp4", NAME: {"bits": 8, "group_size": 64}}, parts)
    assert same(tensors[f"{NAME}.weight"].to_f32(), weights)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(group_size=64), "'group_size': expected 32, got 64"),
        (dict(bits=8), "'bits': expected 4, got 8"),
        (dict(mode="nvfp4"), "'mode': 'nvfp4' is not supported, only 'affine' or 'mxfp4'"),
    ],
)
def test_modes_that_do_not_fit_are_refused(changes, said, tmp_path):
    parts = {"weight": np.zeros((4, 8), np.uint32), "scales": np.zeros((4, 2), np.uint8)}
    with pytest.raises(ValueError, match=said):
        opened(tmp_path, {"bits": 4, "group_size": 32, "mode": "mxfp4", **changes}, parts)[f"{NAME}.weight"]


def test_a_stack_that_no_model_has_is_refused(tmp_path):
    parts, _ = forms.mlx(4)(np.random.default_rng(3), 4, 64)
    stack = {name: array[None] for name, array in parts.items()}
    with pytest.raises(ValueError, match="stacks are supported only of 'switch_mlp', 'switch_glu' and 'experts'"):
        opened(tmp_path, MLX, stack, "model.layers.0.mlp.towers.up_proj")


@pytest.mark.parametrize("name", ["layers.0.mlp.switch_mlp.up_proj", "layers.0.block_sparse_moe.input_linear"])
def test_an_empty_stack_of_any_number_of_matrices_is_named(name, tmp_path):
    """A file of a few bytes, whose matrices would be a million million tensors."""
    entry = {"dtype": "F32", "shape": [1 << 40, 0, 4], "data_offsets": [0, 0]}
    path = write(tmp_path / "m.safetensors", with_header(json.dumps({f"{name}.weight": entry}), b""))
    with pytest.raises(ValueError, match=r"\[1099511627776, 0, 4\]: a stack of 1099511627776 matrices, at most 4096"):
        one_by_one(unquantized({}, merge([open_file(path)])))


def test_stacks_of_too_many_matrices_in_all_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lockstep.weights.tensor.MAX_PARTS", 5)
    stacks = {f"model.layers.{i}.mlp.switch_mlp.up_proj.weight": np.ones((3, 2, 2), np.float32) for i in range(2)}
    path = write(tmp_path / "m.safetensors", safetensors_bytes(stacks))
    with pytest.raises(ValueError, match="stacks of more than 5 matrices in all"):
        unquantized({}, merge([open_file(path)]))
