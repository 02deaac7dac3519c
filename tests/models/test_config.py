"""How a config.json is read, and which configs are refused with which message."""

import numpy as np
import pytest

from lockstep.models.model_config import Experts, Heads, LinearAttention, Mlp, Rope
from lockstep.models.recording import record, record_on
from lockstep.models.registry import model_config
from lockstep.models.shapes import AnyTensor, only_shape
from lockstep.ops.attention.rope import RopeScaling
from lockstep.ops.linear.linear import Linear
from tests.models import published as p
from tests.models import tiny
from tests.models.cases import CASES, LLAMA3, SEED, YARN, case, hybrid, nested, windowed
from tests.models.running import load


@pytest.mark.parametrize(
    "config, expected, heads",
    [
        (
            p.LLAMA_3_2_1B,
            dict(tied=True, eos_ids=(128001, 128008, 128009)),
            dict(num_kv_heads=8, rope=Rope(64, 5e5, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))),
        ),
        (p.LLAMA_2_7B, dict(tied=False, rms_eps=1e-5), dict(rope=Rope(128, 1e4), head_dim=128, scale=128**-0.5)),
        (p.SMOLLM2, dict(tied=True), dict(num_heads=9, head_dim=64)),
        (p.MISTRAL_7B_V0_3, dict(tied=False), dict(num_kv_heads=8, head_dim=128, rope=Rope(128, 1e6))),
        (p.QWEN2_5_0_5B, {}, dict(qkv_bias=True, o_bias=False, head_dim=64, num_kv_heads=2)),
        (p.QWEN3_0_6B, {}, dict(qkv_bias=False, head_dim=128)),
        (p.QWEN3_30B_A3B, {}, {}),
        (p.SMOLLM3_3B, dict(tied=True), dict(rope=Rope(128, 5e6))),
        (p.QWEN3_5_0_8B, dict(tied=True, eos_ids=(248044,)), dict(rope=Rope(64, 1e7))),
    ],
    ids=lambda v: v.get("model_type") if "model_type" in v else "",
)
def test_published_configs(config, expected, heads):
    """heads: fields of the first attention layer's Heads; biases are False where they are not named."""
    made = model_config(config)
    assert {k: getattr(made, k) for k in expected} == expected
    found = next(layer.mixer for layer in made.layers if isinstance(layer.mixer, Heads))
    assert {k: getattr(found, k) for k in heads} == heads
    assert found.qkv_bias == heads.get("qkv_bias", False) and not found.o_bias
    assert all(layer.window == 0 for layer in made.layers)


def test_layers_of_published_configs():
    assert [layer.mixer.rope is not None for layer in model_config(p.SMOLLM3_3B).layers] == [
        True,
        True,
        True,
        False,
    ] * 9
    qwen3_5 = model_config(p.QWEN3_5_0_8B)
    assert [layer.kind for layer in qwen3_5.layers] == (["linear attention"] * 3 + ["attention"]) * 6
    assert {layer.mixer for layer in qwen3_5.layers[:3]} == {LinearAttention(16, 16, 128, 128, 4)}
    assert qwen3_5.mtp_layers == qwen3_5.layers[3:4]
    assert {layer.mlp for layer in model_config(p.QWEN3_30B_A3B).layers} == {Experts(128, 8, 768, True)}


def heads(config):
    """The Heads of the first attention layer."""
    return next(layer.mixer for layer in model_config(config).layers if isinstance(layer.mixer, Heads))


def windows(config):
    return [layer.window for layer in model_config(config).layers]


def test_windows():
    mistral = case("mistral")
    assert windows(mistral) == [4096] * 3  # the default of transformers
    assert windows({**mistral, "sliding_window": None}) == [0] * 3
    sliding = dict(use_sliding_window=True, sliding_window=5)
    assert windows(case("qwen2", max_window_layers=2, **sliding)) == [0, 0, 5]
    assert windows(case("qwen3", layer_types=["sliding_attention", "full_attention", "full_attention"], **sliding)) == [
        5,
        0,
        0,
    ]
    assert windows(case("qwen3", use_sliding_window=False, sliding_window=5, max_window_layers=0)) == [0] * 3
    assert windows({**CASES["qwen3_moe"], **sliding, "max_window_layers": 48}) == [5] * 3
    for name in ("qwen2", "qwen3", "qwen3_moe"):  # no layer has a window
        assert windows({**CASES[name], **sliding, "sliding_window": None, "max_window_layers": 0}) == [0] * 3
    assert windows({**CASES["smollm3"], **sliding}) == [0, 5, 0, 5]
    assert windows({**CASES["smollm3_window_by_type"], "layer_types": None}) == [0] * 3


def test_a_list_of_ropes_may_be_longer_than_the_model():
    longer, exact = (case("smollm3", no_rope_layers=[1, 0, 1, 0][:n]) for n in (4, 3))
    assert model_config(longer) == model_config(exact)


def test_ropes_by_layer_type():
    """As transformers 5 writes them; they win over the older keys."""
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    newer = windowed(rope_parameters=ropes, rope_scaling=None, rope_local_base_freq=7.0)
    assert model_config(newer) == model_config(windowed())
    silent = model_config(windowed(rope_theta=None, rope_local_base_freq=None))
    assert [layer.mixer.rope.theta for layer in silent.layers] == [1e4, 1e4, 1e6]


def test_layers_without_experts():
    layers = model_config(CASES["qwen3_moe_some_dense"]).layers
    assert [layer.mlp for layer in layers] == [Mlp(96)] * 3 + [Experts(6, 2, 48, True)]


def test_what_a_silent_config_means():
    def without(config, *keys):
        return {k: v for k, v in config.items() if k not in keys}

    assert not model_config(without(case("llama"), "tie_word_embeddings")).tied
    assert model_config(without(case("smollm3"), "tie_word_embeddings", "rope_theta")).tied
    assert heads(without(case("smollm3"), "rope_theta")).rope.theta == 2e6
    assert heads(without(case("llama"), "num_key_value_heads")).num_kv_heads == 4
    plain = hybrid(rope_parameters={"rope_theta": 10.0, "rope_type": "default"})
    assert model_config(without(plain, "layer_types")).layers == model_config(plain).layers
    assert heads(plain).rope.dim == 8  # the default factor is a quarter
    outer = {"model_type": "qwen3_5", "eos_token_id": [7, 8], "text_config": without(hybrid(), "eos_token_id")}
    assert model_config(outer).eos_ids == (7, 8)


def test_end_tokens_out_of_range_are_none():
    assert model_config(case("llama", eos_token_id=[2, -1, 96, 1 << 40])).eos_ids == (2,)


def test_experts_may_be_counted_under_either_name():
    saved = dict(CASES["qwen3_moe"])  # transformers 5 writes num_local_experts
    saved["num_local_experts"] = saved.pop("num_experts")
    assert model_config(saved) == model_config(CASES["qwen3_moe"])


def test_old_context_of_scaled_rope():
    llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert heads(case("llama", rope_scaling=llama3)).rope.scaling.original_max_position_embeddings == 256
    outside = case("llama", rope_scaling=llama3, original_max_position_embeddings=64)
    assert heads(outside).rope.scaling.original_max_position_embeddings == 64


def test_a_rope_may_be_described_twice():
    old = case("llama", rope_scaling=YARN)
    both = {**old, "rope_parameters": {**YARN, "rope_theta": old["rope_theta"]}}
    assert model_config(both) == model_config(old)
    assert model_config({**both, "rope_scaling": {"type": "yarn", "factor": YARN["factor"]}}) == model_config(old)


def test_queries_grow_from_the_context_that_the_rope_has():
    mixer = heads({**CASES["ministral3"], "original_max_position_embeddings": 16})
    assert mixer.growth.context == mixer.rope.scaling.original_max_position_embeddings == 16


def test_gemma_reads_one_of_two_names_of_the_activation():
    for others in ({"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "silu"}):
        made = model_config(windowed(**others))
        assert {layer.mlp.activation for layer in made.layers} == {"gelu_tanh"}
        assert model_config({**CASES["gemma3_nested"], **others}).layers
    with pytest.raises(ValueError, match="'hidden_activation': 'silu' is not supported, only 'gelu_pytorch_tanh'"):
        model_config(windowed(hidden_activation="silu", hidden_act="gelu_pytorch_tanh"))


@pytest.mark.parametrize("name", ["gemma3_nested", "qwen3_5_nested"])
def test_a_text_part_may_leave_out_its_model_type(name):
    text = {key: value for key, value in CASES[name]["text_config"].items() if key != "model_type"}
    assert model_config({**CASES[name], "text_config": text}) == model_config(CASES[name])


OUTSIDE = dict.fromkeys(("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"))
REFUSED = [
    (case("gpt2"), "model_type 'gpt2' is not supported; supported are "),
    (case(None), "model_type None is not supported"),
    (case("llama", attention_multiplier=0.5), "config key 'attention_multiplier' (value 0.5) is not supported"),
    (case("llama", logits_scaling=8.0), "'logits_scaling'"),
    (case("llama", embedding_multiplier=12), "'embedding_multiplier'"),
    (case("qwen3", final_logit_softcapping=30.0), "'final_logit_softcapping'"),
    (case("llama", residual_multiplier=0.2), "'residual_multiplier'"),
    (case("llama", clip_qkv=8.0), "'clip_qkv'"),
    (case("llama", rope_scaling={**YARN, "truncate": "no"}), "config key 'truncate': expected true or false, got 'no'"),
    (case("llama", rope_scaling={**LLAMA3, "factor": 1e-9}), "a positive number, got 1e-09; allowed is 1e-06 to 1e+12"),
    (
        {**CASES["phi3_long"], "original_max_position_embeddings": 1},
        "'original_max_position_embeddings': expected a positive number, got 1; allowed is 2 to 1e+12",
    ),
    (case("qwen2", is_causal=False), "config key 'is_causal': False is not supported, only True"),
    ({**CASES["llama_nested"], "is_causal": False}, "config key 'is_causal': False is not supported, only True"),
    (
        case("llama", rope_scaling=YARN, rope_parameters={"rope_theta": 5.0}),
        "'rope_scaling' and 'rope_parameters' describe two ropes: expected one of them, or the same 'rope_type' in",
    ),
    ({**CASES["olmo3"], "rope_scaling": {"type": "linear"}}, "or the same 'type' in both, got 'linear' and 'yarn'"),
    ({k: v for k, v in CASES["olmo3"].items() if k[:3] != "max"}, "config key 'max_position_embeddings': expected a"),
    (case("llama", hidden_act="gelu"), "config key 'hidden_act': 'gelu' is not supported, only 'silu' or 'swish'"),
    (case("qwen3", mlp_bias=True), "'mlp_bias'"),
    (case("llama", mlp_bias="yes"), "config key 'mlp_bias': expected true or false, got 'yes'"),
    (case("llama", sliding_window=9), "'sliding_window'"),
    (case("mistral", sliding_window=9, attention_bias=True), "'attention_bias'"),
    (case("mistral", layer_types=["full_attention"] * 3), "'layer_types'"),
    (case("qwen2", attention_bias=True), "'attention_bias'"),
    (case("qwen3", num_experts=8), "'num_experts'"),
    (case("llama", partial_rotary_factor=0.5), "config key 'partial_rotary_factor': 0.5 is not supported, only 1"),
    (
        case("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        "rope type 'dynamic' is not supported; supported are default, linear",
    ),
    (
        case("llama", rope_scaling={"rope_type": "longrope", "long_factor": [1.0]}),
        "rope parameter 'short_factor': expected a list of 8 numbers, got None",
    ),
    (case("qwen2", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}), "rope type 'mrope'"),
    (
        case("llama", rope_scaling={"rope_type": "linear"}),
        "rope parameter 'factor': expected a positive number, got None",
    ),
    (
        case("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
        "rope parameter 'low_freq_factor'",
    ),
    (
        case("llama", rope_scaling={"rope_type": "linear", "factor": 2.0, "short_mscale": 1.1}),
        "rope parameter 'short_mscale'",
    ),
    (case("llama", rope_parameters={"full_attention": {"rope_theta": 5.0}}), "rope parameter 'full_attention'"),
    (case("llama", rope_scaling=[2.0]), "config key 'rope_scaling': expected an object, got [2.0]"),
    (case("llama", rope_parameters=1), "config key 'rope_parameters': expected an object, got 1"),
    (case("llama", rope_scaling={"type": ["linear"]}), "rope type ['linear'] is not supported"),
    (case("llama", rope_theta=0), "rope parameter 'rope_theta': expected a positive number, got 0"),
    (
        case("llama", rope_scaling=LLAMA3, original_max_position_embeddings="64"),
        "rope parameter 'original_max_position_embeddings': expected a positive number, got '64'",
    ),
    (case("qwen3", rope_scaling=YARN, rope_theta=1), "rope parameter 'rope_theta': expected more than 1"),
    (
        case("llama", rope_parameters={"partial_rotary_factor": 0.5}),
        "rope parameter 'partial_rotary_factor': 0.5 is not supported, only 1",
    ),
    (hybrid(partial_rotary_factor=0, rope_parameters={}), "rope parameter 'partial_rotary_factor': expected a"),
    (case("qwen2", layer_types=["sliding_attention"] * 3), "config key 'layer_types': sliding_attention needs"),
    (case("qwen3", max_window_layers="2"), "config key 'max_window_layers': expected a number, got '2'"),
    (case("qwen3", use_sliding_window="false"), "config key 'use_sliding_window': expected true or false, got 'false'"),
    (case("qwen3", attention_bias=[1]), "config key 'attention_bias': expected true or false, got [1]"),
    (case("llama", tie_word_embeddings="false"), "config key 'tie_word_embeddings': expected true or false"),
    ({**CASES["qwen3_moe"], "norm_topk_prob": 1}, "config key 'norm_topk_prob': expected true or false, got 1"),
    (case("llama", eos_token_id=[2, True]), "config key 'eos_token_id': expected token ids, got [2, True]"),
    (case("smollm3", no_rope_layers=[[1], 0, 1]), "config key 'no_rope_layers': expected 3 of 0 and 1, got [[1], "),
    (case("smollm3", no_rope_layer_interval=0), "config key 'no_rope_layer_interval': expected 1 to"),
    (hybrid(layer_types=[[1]]), "config key 'layer_types': expected 4 of full_attention and linear_attention"),
    (hybrid(layer_types=None, full_attention_interval="4"), "config key 'full_attention_interval': expected a number"),
    (hybrid(mtp_num_hidden_layers="one"), "config key 'mtp_num_hidden_layers': expected a number, got 'one'"),
    (case("llama", rope_theta=-1.0), "rope parameter 'rope_theta': expected a positive number, got -1.0"),
    ({**CASES["qwen3_moe"], "mlp_only_layers": [3]}, "config key 'mlp_only_layers': expected layers below 3, got [3]"),
    ({**CASES["qwen3_moe"], "mlp_only_layers": 1}, "config key 'mlp_only_layers': expected layers below 3, got 1"),
    ({**CASES["qwen3_moe"], "decoder_sparse_step": 0}, "config key 'decoder_sparse_step': expected 1 to"),
    ({**CASES["qwen3_moe"], "decoder_sparse_step": 2, "intermediate_size": 90}, "ffn_width 90 is not supported"),
    (
        {**CASES["qwen3_moe"], "num_experts_per_tok": 17},
        "config key 'num_experts_per_tok': expected at most 16, got 17",
    ),
    ({**CASES["qwen3_moe"], "moe_intermediate_size": 40}, "experts of width 40 are not supported"),
    ({**CASES["qwen3_moe"], "shared_expert_intermediate_size": 32}, "'shared_expert_intermediate_size'"),
    (hybrid(attn_output_gate=False), "'attn_output_gate'"),
    (hybrid(mtp_use_dedicated_embeddings=True), "'mtp_use_dedicated_embeddings'"),
    (hybrid(layer_types=["full_attention", "chunked_attention"] * 2), "config key 'layer_types': expected 4 of"),
    (hybrid(layer_types=["full_attention"] * 3), "config key 'layer_types': expected 4 of"),
    (hybrid(linear_key_head_dim=24), "key heads of 24 is not supported"),
    (hybrid(linear_num_value_heads=3), "a multiple of the key heads"),
    (case("smollm3", no_rope_layers=[1, 0]), "config key 'no_rope_layers': expected 3 of 0 and 1, got [1, 0]"),
    (case("llama", head_dim=20), "head_dim 20 is not supported: it must be a multiple of 16"),
    (case("llama", head_dim=528), "head_dim 528 is not supported: it must be a multiple of 16 and at most 512"),
    (case("llama", num_key_value_heads=3), "4 heads with 3 kv heads is not supported: these must be a divisor"),
    (case("llama", hidden_size=80), "hidden_size 80 / 4 heads = 20 is not supported: it must be a multiple of 16"),
    (case("llama", hidden_size=80, head_dim=32), "hidden_size 80 is not supported"),
    (case("llama", intermediate_size=90), "ffn_width 90"),
    (case("llama", vocab_size="many"), "config key 'vocab_size': expected a number, got 'many'"),
    (case("llama", num_hidden_layers=0), "config key 'num_hidden_layers': expected 1 to 1000, got 0"),
    (case("llama", num_hidden_layers=True), "config key 'num_hidden_layers': expected a number, got True"),
    (case("llama", head_dim="64"), "config key 'head_dim': expected a number, got '64'"),
    (windowed(hidden_activation="gelu"), "config key 'hidden_activation': 'gelu' is not supported, only 'gelu_pytorch"),
    (windowed(head_dim=513), "head_dim 513 is not supported: it must be a multiple of 16 and at most 512"),
    (case("llama", head_dim=513), "head_dim 513 is not supported: it must be a multiple of 16 and at most 512"),
    (hybrid(head_dim=513), "head_dim 513 is not supported: it must be a multiple of 16 and at most 512"),
    (nested({"vocab_size": 9, **OUTSIDE}, "llava"), "model_type 'llava' is not supported"),
    (windowed(attn_logit_softcapping=50.0), "'attn_logit_softcapping'"),
    (windowed(use_bidirectional_attention=True), "'use_bidirectional_attention'"),
    (windowed(query_pre_attn_scalar=0), "config key 'query_pre_attn_scalar': expected 0.001 to"),
    (windowed(sliding_window_pattern=0), "config key 'sliding_window_pattern': expected 1 to"),
    (windowed(layer_types=["full_attention"]), "config key 'layer_types': expected 3 of"),
    (
        windowed(rope_parameters={"rope_theta": 5.0}),
        "config key 'rope_parameters': expected an object for each of full",
    ),
    (windowed(rope_parameters={"sliding_attention": {"rope_type": "yarn"}}), "rope parameter 'factor'"),
    (case("llama", eos_token_id="</s>"), "config key 'eos_token_id': expected token ids, got '</s>'"),
]


@pytest.mark.parametrize("config, message", REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_refused(config, message):
    with pytest.raises(ValueError) as raised:
        model_config(config)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "num_attention_heads",
        "max_position_embeddings",
        "model_type",
    ],
)
def test_missing_key(key):
    with pytest.raises(ValueError, match=key):
        model_config({k: v for k, v in case("llama").items() if k != key})


def altered(tmp_path, config, change):
    """The message with which a checkpoint is refused after `change` was made to its tensors."""
    arrays = tiny.tensors(config, SEED)
    change(arrays)
    with pytest.raises(ValueError) as raised:
        load(tiny.write(tmp_path, config, arrays))
    return str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_norm.weight",
    ],
)
def test_missing_tensor(tmp_path, name):
    message = altered(tmp_path, CASES["qwen3"], lambda arrays: arrays.pop(name))
    assert f"tensor '{name}'" in message and "is missing from the checkpoint" in message


@pytest.mark.parametrize(
    "case_name, name",
    [
        ("qwen3", "model.layers.0.self_attn.k_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3_5", "model.layers.0.linear_attn.A_log"),
        ("qwen3_5", "model.layers.0.linear_attn.conv1d.weight"),
    ],
)
def test_wrong_shape(tmp_path, case_name, name):
    def change(arrays):
        arrays[name] = np.concatenate([arrays[name], arrays[name]])

    message = altered(tmp_path, CASES[case_name], change)
    shape = list(tiny.shapes(CASES[case_name])[name])
    assert message == f"tensor '{name}': expected shape {shape}, found {[2 * shape[0], *shape[1:]]}"


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"])
def test_a_tensor_that_the_config_does_not_announce(tmp_path, name):
    message = altered(tmp_path, CASES["llama"], lambda arrays: arrays.update({name: np.ones(64, np.float32)}))
    assert message.startswith(f"tensor '{name}'") and "is not used" in message


def test_tensors_beside_the_text_model_are_left_alone(tmp_path):
    arrays = tiny.tensors(CASES["llama"], SEED)
    others = ("visual.merger.norm.weight", "vision_tower.norm.weight", "multi_modal_projector.norm.weight")
    others = (*others, *(f"model.{name}" for name in others), "mtp.fc.weight")
    others = (*others, "model.vision_model.encoder.norm.weight", "model.connector.modality_projection.proj.weight")
    for name in (*others, "model.layers.0.self_attn.rotary_emb.inv_freq"):
        arrays[name] = np.ones(8, np.float32)
    assert load(tiny.write(tmp_path, CASES["llama"], arrays)).config.num_layers == 3


def test_the_head_of_an_old_checkpoint_that_also_sees():
    config = model_config({**CASES["gemma3_nested"], "tie_word_embeddings": False})
    asked = AnyTensor(kv_dtype="f32")
    record_on(asked, config)
    shapes = {n.replace("model.", "language_model.model.", 1): shape for n, shape in asked.shapes.items()}
    shapes["language_model.lm_head.weight"] = shapes.pop("lm_head.weight")
    tensors = {name: only_shape(name, shape) for name, shape in shapes.items()}
    program, _ = record(config, tensors, kv_dtype="f32")
    assert "language_model.lm_head.weight" in [weight.name for weight in program.weights()]
    tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]
    with pytest.raises(ValueError, match=r"'lm_head\.weight' and 'language_model\.lm_head\.weight' are both the head"):
        record(config, tensors)


def test_a_head_of_its_own_wins_over_a_config_that_ties_it(tmp_path):
    tied = {**CASES["llama"], "tie_word_embeddings": True}
    program = load(tiny.write(tmp_path, tied, tiny.tensors(CASES["llama"], SEED))).recorded
    head = [op for op in program.ops if isinstance(op, Linear)][-1]
    assert head.weight.name == "lm_head.weight"
