"""How configs of Phi, Mistral, Granite, OLMo, Seed-OSS and SmolVLM are read, and which of their files are refused."""

import numpy as np
import pytest

from lockstep.models.model_config import Experts, Rope
from lockstep.models.registry import model_config
from lockstep.ops.attention.rope import Growth, RopeScaling, attention_factor
from tests.models import tiny
from tests.models.cases import CASES, GROWING, LONGROPE, case
from tests.models.published import dense as p
from tests.models.running import load, logits_of


def heads(config):
    """The heads of the first layer."""
    return model_config(config).layers[0].mixer


def refused(config):
    """The message with which a config is refused."""
    with pytest.raises(ValueError) as raised:
        model_config(config)
    return str(raised.value)


# ------------------------------------------------------------ Mistral


def test_published_mistral():
    ministral, small = heads(p.MINISTRAL_3_3B), heads(p.MISTRAL_SMALL_3_1)
    assert (ministral.num_heads, ministral.num_kv_heads, ministral.head_dim, ministral.window) == (32, 8, 128, 0)
    assert ministral.growth == Growth(0.1, 16384) and ministral.rope.theta == 1e6
    scaling = dict(factor=16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    assert ministral.rope.scaling == RopeScaling("yarn", original_max_position_embeddings=16384, **scaling)
    assert attention_factor(ministral.rope.scaling) == 1 and model_config(p.MINISTRAL_3_3B).tied
    assert (small.num_heads, small.head_dim, small.growth, small.rope.theta) == (32, 128, None, 1e9)
    assert small.rope.scaling == RopeScaling() and small.window == 0


def test_what_ministral_leaves_out():
    bare = {k: v for k, v in case("ministral3", head_dim=128).items() if k != "rope_theta"}
    made = heads(bare)
    assert made.growth == Growth(0.1, 16384) and made.rope == heads(p.MINISTRAL_3_3B).rope and made.window == 0
    assert heads({k: v for k, v in bare.items() if k != "head_dim"}).head_dim == 128
    still = {**GROWING, "llama_4_scaling_beta": 0}
    assert heads(case("ministral3", rope_theta=None, rope_parameters=still)).growth is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(llama_4_scaling_beta=None), "'llama_4_scaling_beta': expected a positive number, got None"),
        (dict(llama_4_scaling_beta=-0.1), "'llama_4_scaling_beta': expected a positive number, got -0.1"),
        (dict(original_max_position_embeddings=0), "'original_max_position_embeddings': expected a positive number"),
        (dict(rope_type="mrope"), "rope type 'mrope' is not supported"),
        (dict(mrope_section=[2, 3, 3]), "rope parameter 'mrope_section' is not supported"),
    ],
)
def test_ministral_is_refused(changes, message):
    assert message in refused(case("ministral3", rope_theta=None, rope_parameters={**GROWING, **changes}))


# ------------------------------------------------------------ Phi


def test_published_phi():
    phi_4, mini = heads(p.PHI_4), heads(p.PHI_4_MINI)
    assert (phi_4.num_kv_heads, phi_4.head_dim, phi_4.window) == (10, 128, 0)
    assert (phi_4.rope.theta, phi_4.rope.dim, phi_4.rope.scaling) == (25e4, 128, RopeScaling())
    assert (mini.num_kv_heads, mini.head_dim, mini.window, mini.rope.dim) == (8, 128, 0, 96)
    assert mini.rope.scaling.factors == tuple(p.PHI_4_MINI["rope_scaling"]["long_factor"])
    assert attention_factor(mini.rope.scaling) == pytest.approx(1.1902380714238083, rel=1e-7)
    assert model_config(p.PHI_4_MINI).tied and not model_config(p.PHI_4).tied


@pytest.mark.parametrize("old", [{"type": "su"}, {"type": "yarn"}, {"rope_type": "yarn"}])
def test_old_names_of_longrope(old):
    factors = {k: v for k, v in LONGROPE.items() if k != "rope_type"}
    assert heads({**CASES["phi3_long"], "rope_scaling": {**factors, **old}}) == heads(CASES["phi3_long"])


def test_the_context_of_the_first_training_decides_the_factors():
    scaling = lambda **changes: heads({**CASES["phi3_long"], **changes}).rope.scaling
    long, short = (tuple(LONGROPE[f"{name}_factor"]) for name in ("long", "short"))
    assert scaling().factors == long and scaling().factor == 8
    assert scaling(original_max_position_embeddings=256).factors == short
    assert scaling(original_max_position_embeddings=255).factors == long
    default = {k: v for k, v in CASES["phi3_long"].items() if k != "original_max_position_embeddings"}
    assert heads(default).rope.scaling.factors == short  # 4096
    assert heads({**default, "max_position_embeddings": 4097}).rope.scaling.factors == long


def test_a_window_that_no_text_fills_is_none():
    assert [heads(case("phi3", sliding_window=w)).window for w in (9, 255, 256, None)] == [9, 255, 0, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(attention_bias=True), "config key 'attention_bias'"),
        (dict(mlp_bias=True), "'mlp_bias'"),
        (dict(lm_head_bias=True), "'lm_head_bias'"),
        (dict(interpolate_factor=2), "'interpolate_factor' (value 2) is not supported"),
        (dict(full_attn_mod=2), "'full_attn_mod'"),
        (dict(sliding_window=0), "config key 'sliding_window': expected 1 to"),
        (dict(rope_scaling={**LONGROPE, "short_mscale": 1.2}), "rope parameter 'short_mscale' is not supported"),
        (dict(rope_scaling={**LONGROPE, "long_factor": [1.0] * 5}), "'long_factor': expected a list of 6 numbers, got"),
        (
            dict(rope_scaling={**LONGROPE, "short_factor": [1.0] * 5 + [0]}),
            "'short_factor': expected a positive number",
        ),
        (dict(rope_scaling={**LONGROPE, "long_factor": "123456"}), "'long_factor': expected a list of 6 numbers"),
    ],
)
def test_phi_is_refused(changes, message):
    assert message in refused({**CASES["phi3_long"], **changes})


# ------------------------------------------------------------ Granite


def test_published_granite():
    made = model_config(p.GRANITE_3_3_8B)
    assert (made.embedding_multiplier, made.residual_multiplier, made.logits_scaling) == (12, 0.22, 16) and made.tied
    heads = made.layers[0].mixer
    assert (heads.scale, heads.rope.theta, heads.num_kv_heads, heads.o_bias) == (1 / 128, 1e7, 8, False)


def test_published_experts_of_granite():
    made = model_config(p.GRANITE_3_1_3B_A800M)
    assert {layer.mlp for layer in made.layers} == {Experts(40, 8, 512, True)} and len(made.layers) == 32
    assert (made.logits_scaling, made.layers[0].mixer.scale, made.layers[0].mixer.head_dim) == (6, 1 / 64, 64)
    message = "config key 'num_experts_per_tok': expected at most 6, got 7"
    assert message == refused({**CASES["granitemoe"], "num_experts_per_tok": 7})


def test_experts_of_granite_as_transformers_5_names_them(tmp_path):
    names = {
        "router.layer.weight": "router.weight",
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
    }
    config, renamed = CASES["granitemoe"], {}
    arrays = tiny.tensors(config, 3)
    for name, array in arrays.items():
        before, part, after = name.partition("block_sparse_moe.")
        renamed[f"{before}{part}{names[after]}" if part else name] = array
    ids = tiny.prompt(config, 9)
    old, new = (load(tiny.write(tmp_path / n, config, a)) for n, a in (("old", arrays), ("new", renamed)))
    assert logits_of(old, ids).tobytes() == logits_of(new, ids).tobytes()


def test_a_stack_of_granite_of_another_number_of_experts_is_refused(tmp_path):
    config = CASES["granitemoe"]
    arrays = tiny.tensors(config, 3)
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    with pytest.raises(ValueError, match=r"mlp\.experts\.5\.gate_proj\.weight' of shape .* is missing"):
        load(tiny.write(tmp_path / "few", config, {**arrays, name: arrays[name][:5]}))
    with pytest.raises(ValueError, match=r"mlp\.experts\.6\.gate_proj\.weight' .* is not used"):
        load(tiny.write(tmp_path / "many", config, {**arrays, name: np.concatenate([arrays[name]] * 2)}))
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight'"):
        load(tiny.write(tmp_path / "flat", config, {**arrays, name: arrays[name].reshape(-1, 64)}))


def test_multipliers_of_granite_are_1_by_default():
    made = model_config(case("granite"))
    assert (made.embedding_multiplier, made.residual_multiplier, made.logits_scaling) == (1, 1, 1)
    assert made.layers[0].mixer.scale == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(logits_scaling=0), "config key 'logits_scaling': expected 1e-06 to 1000000.0, got 0"),
        (dict(residual_multiplier="0.22"), "config key 'residual_multiplier': expected a number, got '0.22'"),
        (dict(attention_multiplier=True), "'attention_multiplier': expected a number, got True"),
        (dict(position_embedding_type="nope"), "'position_embedding_type' (value 'nope') is not supported"),
        (dict(num_local_experts=4), "'num_local_experts'"),
    ],
)
def test_granite_is_refused(changes, message):
    assert message in refused({**CASES["granite"], **changes})


# ------------------------------------------------------------ OLMo


def test_published_olmo():
    assert heads(p.OLMO_2_7B).rope == Rope(128, 5e5) and heads(p.OLMO_2_7B).window == 0
    layers = model_config(p.OLMO_3_7B).layers
    assert [layer.window for layer in layers] == [4096, 4096, 4096, 0] * 8
    assert layers[0].mixer.rope == Rope(128, 5e5)
    assert layers[3].mixer.rope.scaling.kind == "yarn" and layers[3].mixer.rope.theta == 5e5
    assert attention_factor(layers[3].mixer.rope.scaling) == 1.2079441541679836
    bare = {k: v for k, v in p.OLMO_3_7B.items() if k not in ("layer_types", "sliding_window", "rope_theta")}
    assert model_config(bare).layers == layers


def test_theta_of_an_old_config_of_olmo_holds_for_all_layers():
    thetas = {layer.mixer.rope.theta for layer in model_config({**p.OLMO_3_7B, "rope_theta": 1e4}).layers}
    assert thetas == {1e4}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("olmo2", dict(sliding_window=9), "'sliding_window'"),
        ("olmo2", dict(layer_types=["full_attention"] * 3), "'layer_types'"),
        ("olmo2", dict(clip_qkv=8.0), "'clip_qkv'"),
        ("olmo3", dict(layer_types=["full_attention"]), "config key 'layer_types': expected 4 of"),
        ("olmo3", dict(rope_parameters={"rope_theta": 5.0}), "'rope_parameters': expected an object for each of full"),
    ],
)
def test_olmo_is_refused(name, changes, message):
    assert message in refused({**CASES[name], **changes})


# ------------------------------------------------------------ Seed-OSS


def test_published_seed():
    seed = heads(p.SEED_OSS_36B)
    assert (seed.num_heads, seed.num_kv_heads, seed.head_dim, seed.qkv_bias, seed.o_bias) == (80, 8, 128, True, False)
    assert seed.rope == Rope(128, 1e7) and not model_config(p.SEED_OSS_36B).layers[0].mlp.bias
    silent = {k: v for k, v in p.SEED_OSS_36B.items() if k not in ("attention_bias", "attention_out_bias", "head_dim")}
    assert heads(silent) == seed
    assert "'attention_out_bias': expected true or false" in refused({**silent, "attention_out_bias": 1})


# ------------------------------------------------------------ Llama's


def test_the_text_part_of_smolvlm_is_llama():
    made = model_config(p.SMOLVLM_256M)
    assert (made.model_type, made.num_layers, made.vocab_size, made.tied) == ("llama", 30, 49280, False)
    assert (made.layers[0].mixer.head_dim, made.layers[0].mixer.rope.theta) == (64, 1e5)
    assert "'scale_factor'" in refused(case("llama", scale_factor=4))
