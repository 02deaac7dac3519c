"""gpt-oss: its config, planted mistakes, and experts stored as MXFP4 blocks."""

import numpy as np
import pytest

from lockstep.formats import MXFP4
from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.model_config import Experts, Heads, Rope
from lockstep.models.registry import model_config
from lockstep.ops.attention.rope import RopeScaling
from lockstep.ops.linear.experts import ExpertBias, ExpertGated, ExpertLinear
from tests.golden.record_models import GOLDEN
from tests.models import published, tiny
from tests.models.cases import CASES, SEED, YARN
from tests.models.mistakes import filled, params, without_bias_of
from tests.models.running import load, logits_of
from tests.models.test_mutations import is_red, mapped, run
from tests.weights.files import write_folder

NAME = "gpt_oss"
CASE = CASES[NAME]


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


# ------------------------------------------------------------ config.json


def test_published_config():
    made = model_config(published.GPT_OSS_20B)
    yarn = RopeScaling("yarn", 32.0, original_max_position_embeddings=4096, beta_fast=32.0, truncate=False)
    heads = dict(num_heads=64, num_kv_heads=8, head_dim=64, scale=0.125, rope=Rope(64, 150000.0, yarn))
    biased = dict(qkv_bias=True, o_bias=True, sinks=True)
    assert [layer.mixer for layer in made.layers] == [Heads(**heads, window=w, **biased) for w in (128, 0)] * 12
    assert {layer.mlp for layer in made.layers} == {Experts(32, 4, 2880, True, "clamped_swiglu", bias=True)}
    assert (made.vocab_size, made.hidden_size, made.tied, made.eos_ids) == (201088, 2880, False, (200002,))


def test_keys_that_may_be_absent():
    """As transformers fills them in."""
    absent = (
        "layer_types sliding_window swiglu_limit attention_bias rope_scaling rope_theta quantization_config".split()
    )
    short = {k: v for k, v in published.GPT_OSS_20B.items() if k not in absent}
    assert model_config(short).layers == model_config(published.GPT_OSS_20B).layers


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(swiglu_limit=6.5), r"config key 'swiglu_limit': 6.5 is not supported, only 7.0"),
        (dict(swiglu_alpha=1.0), r"config key 'swiglu_alpha': 1.0 is not supported, only 1.702"),
        (
            dict(quantization_config={"quant_method": "awq"}),
            r"config key 'quantization_config': 'awq' is not supported",
        ),
        (dict(num_experts_per_tok=9), r"config key 'num_experts_per_tok': expected at most 8, got 9"),
        (dict(sliding_window=None), r"config key 'sliding_window': expected a number, got None"),
        (dict(router_scaling=2.0), r"config key 'router_scaling' \(value 2.0\) is not supported"),
        (dict(hidden_act="gelu"), r"config key 'hidden_act': 'gelu' is not supported"),
    ],
)
def test_configs_that_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        model_config({**CASE, **change})


# ------------------------------------------------------------ planted mistakes


def without_bias_of_experts(width):
    """Leaves out the biases of experts' matrices with `width` outputs."""
    wrong = lambda op: isinstance(op, ExpertBias) and op.width == width
    return lambda op: op.changed(bias=filled(0, op.bias)) if wrong(op) else op


def with_gate(name):
    return lambda op: op.changed(activation=name) if isinstance(op, ExpertGated) else op


ATTENTION = ("attention",)
OPS = {
    "sinks forgotten": lambda op: op.changed(sinks=filled(-1e4, op.sinks)) if op.kind == "attention" else op,
    "sinks of the same weight": lambda op: op.changed(sinks=filled(0, op.sinks)) if op.kind == "attention" else op,
    "biases of queries, keys and values forgotten": without_bias_of("q_proj"),
    "biases of attention's output forgotten": without_bias_of("o_proj"),
    "biases of the router forgotten": without_bias_of("router"),
    "biases of gate and up forgotten": without_bias_of_experts(2 * 48),
    "biases of down forgotten": without_bias_of_experts(64),
    "silu for the clamped SwiGLU": with_gate("silu"),
    "softmax over all experts": params(["route"], renormalise=False),
    "a window on every layer": params(ATTENTION, window=9),
    "windows one too short": params(ATTENTION, window=lambda op: op.window and op.window - 1),
}


@pytest.mark.parametrize("mistake", OPS)
def test_a_mistake_in_the_program_is_seen(mistake, golden, tmp_path):
    is_red(run(tmp_path, NAME, ops=OPS[mistake]), golden, NAME)


def every_pair(change):
    """A change of gates and values [..., pairs, 2] in the matrix and in the biases."""
    changed = lambda a, c: change(a.reshape(*a.shape[:-1], -1, 2)).reshape(a.shape)
    return {"gate_up_proj": changed, "gate_up_proj_bias": changed}


WEIGHTS = {
    "gate and up as two halves": every_pair(lambda a: np.moveaxis(a, -1, -2)),
    "gate and up swapped": every_pair(lambda a: a[..., ::-1]),
    "a value without its 1": {"gate_up_proj_bias": lambda a, c: a - np.tile(np.float32([0, 1]), a.shape[1] // 2)},
    "experts in another order": {"experts.down_proj": lambda a, c: a[::-1]},
    "sinks of other heads": {"sinks": lambda a, c: a[::-1]},
}


@pytest.mark.parametrize("mistake", WEIGHTS)
def test_a_mistake_in_the_weights_is_seen(mistake, golden, tmp_path):
    arrays = tiny.tensors(CASE, SEED)
    changed = {
        name: array if (to := mapped(name, WEIGHTS[mistake])) is None else to(array, arrays, name, CASE)
        for name, array in arrays.items()
    }
    assert any(changed[name] is not arrays[name] for name in arrays)
    is_red(run(tmp_path, NAME, changed), golden, NAME)


CONFIGS = {
    "yarn's limits rounded": dict(rope_scaling=YARN),
    "yarn without its factor on the tables": dict(rope_scaling={**CASE["rope_scaling"], "attention_factor": 1.0}),
    "another theta": dict(rope_theta=150000.0),
    "windows on the other layers": dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "windows forgotten": dict(layer_types=["full_attention"] * 3),
    "windows one too long": dict(sliding_window=10),
    "one expert too few": dict(num_experts_per_tok=2),
}


@pytest.mark.parametrize("mistake", CONFIGS)
def test_a_misread_config_is_seen(mistake, golden, tmp_path):
    is_red(run(tmp_path, NAME, tiny.tensors(CASE, SEED), config={**CASE, **CONFIGS[mistake]}), golden, NAME)


# ------------------------------------------------------------ folders with MXFP4 blocks

BLOCKS = {**CASE, "intermediate_size": 64, "quantization_config": {"quant_method": "mxfp4"}}
F = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def microscaled(random, shape):
    """(blocks, scales, weights) of matrices [experts, outputs, inputs]: two neighbours a byte, the first in its low
    nibble."""
    codes = random.integers(0, 16, shape, np.uint8)
    scales = random.integers(121, 125, (*shape[:-1], shape[-1] // 32), np.uint8)
    weights = F[codes] * np.repeat(np.float32(2) ** (scales.astype(np.float32) - 127), 32, axis=-1)
    pairs = codes.reshape(*scales.shape, 16, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scales, weights


def with_blocks(seed=3):
    """(tensors with experts as blocks, the same with experts as numbers)."""
    random, plain = np.random.default_rng(seed), tiny.tensors(BLOCKS, seed)
    stored = dict(plain)
    for name in [n for n in plain if n.endswith(("gate_up_proj", "down_proj"))]:
        E, K, N = plain[name].shape
        blocks, scales, weights = microscaled(random, (E, N, K))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del stored[name]
        plain[name] = np.ascontiguousarray(weights.swapaxes(1, 2))
    return stored, plain


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, (stored, plain) = tmp_path_factory.mktemp("gpt_oss"), with_blocks()
    return write_folder(folder / "blocks", stored, **BLOCKS), write_folder(folder / "plain", plain, **BLOCKS)


def test_blocks_are_the_numbers_that_they_stand_for(folders):
    blocks, plain = (load(folder) for folder in folders)
    ids = tiny.prompt(BLOCKS, 40)
    assert logits_of(blocks, ids).tobytes() == logits_of(plain, ids).tobytes()


def test_blocks_are_multiplied_as_they_are_stored(folders):
    model = load(folders[0], "auto")
    weights = [op.weight for op in model.recorded.ops if isinstance(op, ExpertLinear)]
    assert [weight.format for weight in weights] == [MXFP4.name] * 6
    ids = tiny.prompt(BLOCKS, 40)
    exact, found = logits_of(load(folders[1]), ids), logits_of(model, ids)
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.05 * np.sqrt(np.mean(exact**2))


@pytest.mark.parametrize("weights", ["auto", "q8_0", "bf16"])
def test_biases_are_added_without_a_pass_over_memory(weights, folders):
    ops = load(folders[0], weights).program.ops
    assert not any(isinstance(op, ExpertBias) for op in ops)
    assert sum(isinstance(op, ExpertLinear) and op.bias is not None for op in ops) == 6


@pytest.mark.parametrize(
    "name, change, said",
    [
        (
            "down_proj_scales",
            lambda a: a[:, :, :1],
            r"down_proj_scales': expected shape \[8, 64, 2\], found \[8, 64, 1\]",
        ),
        (
            "down_proj_blocks",
            lambda a: a[:7],
            r"down_proj_blocks': expected shape \[8, 64, 2, 16\], found \[7, 64, 2, 16\]",
        ),
        ("down_proj_blocks", lambda a: a.astype(np.float32), "down_proj_blocks': expected bytes, found f32"),
        ("down_proj_scales", lambda a: np.full_like(a, 255), "expected finite block scales"),
    ],
)
def test_wrong_blocks_are_named(name, change, said, tmp_path):
    stored, _ = with_blocks()
    key = f"model.layers.1.mlp.experts.{name}"
    folder = write_folder(tmp_path / "m", {**stored, key: change(stored[key])}, **BLOCKS)
    with pytest.raises(ValueError, match=said):
        logits_of(load(folder, "auto"), [1, 2, 3])


def test_a_missing_tensor_is_named(tmp_path):
    stored, _ = with_blocks()
    del stored["model.layers.2.mlp.experts.gate_up_proj_scales"]
    with pytest.raises(ValueError, match=r"2\.mlp\.experts\.gate_up_proj_scales' of shape \[8, 128, 2\] is missing"):
        load(write_folder(tmp_path, stored, **BLOCKS))
    assert open_checkpoint(tmp_path).config["quantization_config"]["quant_method"] == MXFP4.name
