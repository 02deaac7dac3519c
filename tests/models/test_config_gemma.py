"""How the config.json of a Gemma is read."""

import re

import pytest

from lockstep.models.families.gemma.gemma3n import quantile
from lockstep.models.model_config import Heads, Mlp, Rope
from lockstep.models.registry import model_config
from lockstep.ops.attention.rope import RopeScaling
from tests.models import tiny
from tests.models.cases import CASES, SEED
from tests.models.published import gemma as p
from tests.models.running import load


def test_a_window_in_five_of_six_layers():
    small, large = model_config(p.GEMMA_3_1B), model_config(p.GEMMA_3_4B)
    assert [layer.window for layer in small.layers] == ([512] * 5 + [0]) * 4 + [512] * 2
    assert [layer.window for layer in large.layers] == ([1024] * 5 + [0]) * 5 + [1024] * 4
    assert small.layers[0].mixer == Heads(4, 1, 256, 1 / 16, Rope(256, 1e4), 512)
    assert small.layers[5].mixer == Heads(4, 1, 256, 1 / 16, Rope(256, 1e6))
    assert large.layers[0].mixer == Heads(8, 4, 256, 1 / 16, Rope(256, 1e4), 1024)
    assert large.layers[5].mixer == Heads(8, 4, 256, 1 / 16, Rope(256, 1e6, RopeScaling("linear", 8.0)))
    assert {layer.mlp for layer in large.layers} == {Mlp(10240, "gelu_tanh")}
    assert (large.vocab_size, large.rms_eps, large.max_positions, large.tied) == (262208, 1e-6, 131072, True)
    assert large.eos_ids == small.eos_ids == (1, 106)


def test_caps_and_a_window_in_every_second_layer():
    made = model_config(p.GEMMA_2_27B)
    assert [layer.window for layer in made.layers] == [4096, 0] * 23
    assert made.layers[1].mixer == Heads(32, 16, 128, 1 / 12, Rope(128, 1e4), 0, 50.0)
    assert (made.logit_cap, made.tied, made.layers[0].mlp) == (30.0, True, Mlp(36864, "gelu_tanh"))
    names = "attn_logit_softcapping", "final_logit_softcapping"
    silent = model_config({k: v for k, v in p.GEMMA_2_27B.items() if k not in names})
    assert silent == made
    uncapped = model_config({**p.GEMMA_2_27B, **dict.fromkeys(names)})
    assert uncapped.logit_cap == 0 and uncapped.layers[0].mixer.soft_cap == 0
    with pytest.raises(ValueError, match="config key 'use_bidirectional_attention'"):
        model_config({**p.GEMMA_2_27B, "use_bidirectional_attention": True})
    with pytest.raises(ValueError, match=r"config key 'final_logit_softcapping': expected 0\.001 to"):
        model_config({**p.GEMMA_2_27B, "final_logit_softcapping": -1.0})


def test_heads_of_two_sizes():
    made = model_config(p.GEMMA_4_31B)
    slides, full = made.layers[0].mixer, made.layers[5].mixer
    assert [layer.window for layer in made.layers] == ([1024] * 5 + [0]) * 10
    assert slides == Heads(32, 16, 256, 1.0, Rope(256, 1e4), 1024, norms_values=True)
    turning = RopeScaling("proportional", partial_rotary_factor=0.25)
    assert full == Heads(32, 4, 512, 1.0, Rope(512, 1e6, turning), own_values=False, norms_values=True)
    assert (made.logit_cap, made.tied, made.eos_ids) == (30.0, True, (1,)) and not made.layers[0].input_width
    newer = {k: v for k, v in p.GEMMA_4_31B["text_config"].items() if "global" not in k}
    sizes = {str(i): {"head_dim": 512, "num_key_value_heads": 4} for i in range(5, 60, 6)}
    assert model_config({**newer, "per_layer_config": sizes}).layers == made.layers
    unified = {k: v for k, v in newer.items() if not k.startswith(("hidden_size_per", "vocab_size_per", "sliding"))}
    unified |= {"model_type": "gemma4_unified_text", "per_layer_config": sizes}
    assert model_config(unified).layers == made.layers


def test_keys_of_earlier_layers_and_inputs_of_each_layer():
    layers = model_config(p.GEMMA_4_E2B).layers
    assert [layer.mixer.keys_of for layer in layers] == [None] * 15 + ([13] * 4 + [14]) * 4
    assert [layer.mlp.width for layer in layers] == [6144] * 15 + [12288] * 20
    assert {layer.input_width for layer in layers} == {256}
    assert {layer.mixer.own_values for layer in layers} == {True}
    assert [layer.mixer.head_dim for layer in layers[3:5]] == [256, 512]


def gemma4(**changes):
    return {**p.GEMMA_4_E2B["text_config"], **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_bidirectional_attention="all"), "'use_bidirectional_attention': only null and 'vision'"),
        (dict(vocab_size_per_layer_input=9), "'vocab_size_per_layer_input': only the vocab_size itself"),
        (dict(num_kv_shared_layers=31), "'num_kv_shared_layers': 31 leave no layer of each type before"),
        (dict(num_kv_shared_layers=36), "'num_kv_shared_layers': 36 leave no layer"),
        (dict(per_layer_config={"35": {}}), "'per_layer_config': '35' is none of 35 layers"),
        (dict(per_layer_config={"1": {"window": 3}}), "'per_layer_config': 'window' is not supported, only head_dim"),
        (dict(per_layer_config=[]), "'per_layer_config': expected an object"),
        (dict(hidden_size_per_layer_input=[1]), "'hidden_size_per_layer_input': expected a number, got [1]"),
        (dict(hidden_size_per_layer_input=24), "input_width 24 is not supported: it must be a multiple of 16"),
        (dict(hidden_activation="silu"), "'hidden_activation': 'silu' is not supported"),
    ],
)
def test_configs_of_gemma4_that_are_refused(changes, message):
    with pytest.raises(ValueError) as raised:
        model_config(gemma4(**changes))
    assert message in str(raised.value)


def test_keys_and_values_of_layers_that_read_others_may_lie_in_the_checkpoint(tmp_path):
    """Some conversions leave them there; they are not read."""
    config = CASES["gemma4_per_layer"]
    arrays = tiny.tensors(config, SEED)
    more = {
        n.replace("layers.3.", "layers.4."): a for n, a in arrays.items() if re.search(r"rs\.3.*(k|v)_(proj|norm)", n)
    }
    assert len(more) == 3 and not more.keys() & arrays.keys()
    assert load(tiny.write(tmp_path, config, arrays | more)).recorded.ops


def test_streams_sparse_gates_and_a_shorter_second_embedding():
    made = model_config(p.GEMMA_3N_E4B)
    assert [layer.window for layer in made.layers] == ([512] * 4 + [0]) * 7
    assert [layer.mixer.keys_of for layer in made.layers] == [None] * 20 + ([18] * 4 + [19]) * 3
    cutoffs = [layer.mlp.deviations for layer in made.layers]
    assert cutoffs[:10] == [pytest.approx(1.6448536269514722, abs=1e-11)] * 10 and cutoffs[10:] == [None] * 25
    assert made.layers[4].mixer == Heads(8, 2, 256, 1.0, Rope(256, 1e6), norms_values=True)
    assert made.layers[3].mixer.rope == Rope(256, 1e4) and made.layers[0].side_rank == 64
    assert (made.vocab_size, made.input_rows, made.logit_cap, made.tied) == (262400, 262144, 30.0, True)
    silent = {"model_type": "gemma3n_text"}
    assert model_config(silent).layers == made.layers and model_config(silent).input_rows == made.input_rows


@pytest.mark.parametrize("share, deviations", [(0.5, 0.0), (0.25, -0.6744897501960817), (0.99, 2.3263478740408408)])
def test_quantiles_of_the_normal_distribution(share, deviations):
    assert quantile(share) == pytest.approx(deviations, abs=1e-11)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(altup_num_inputs=3), "'altup_num_inputs': 3 is not supported, only 4"),
        (dict(altup_active_idx=1), "'altup_active_idx': 1 is not supported, only 0"),
        (dict(altup_correct_scale=False), "'altup_correct_scale': False is not supported, only True"),
        (dict(laurel_rank=24), "laurel_rank 24 is not supported: it must be a multiple of 16"),
        (dict(intermediate_size=[96] * 5), "'intermediate_size': expected 6 numbers, got 5"),
        (dict(activation_sparsity_pattern=[0.5] * 5), "'activation_sparsity_pattern': expected 6 numbers"),
        (dict(activation_sparsity_pattern=[1.0] * 6), "expected numbers from 0, below 1, got 1.0"),
        (dict(vocab_size_per_layer_input=97), "'vocab_size_per_layer_input': expected 1 to 96, got 97"),
        (dict(num_kv_shared_layers=5), "'num_kv_shared_layers': 5 leave no layer of each type before"),
        (dict(query_rescale_scalar=2.0), "'query_rescale_scalar' (value 2.0) is not supported"),
    ],
)
def test_configs_of_gemma3n_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_config({**CASES["gemma3n"], **changes})
