"""A GGUF file of Gemma 4 computes the same bits as the folder that it was converted from."""

import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from tests.models import tiny
from tests.models.cases import EXPERTS, PER_LAYER, large_heads
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write
from tests.weights.gguf.gguf_models import fuse_attention

STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{p}_norm": f"attn_{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
    "layer_scalar": "layer_output_scale",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "router.proj": "ffn_gate_inp",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
}
KEYS = dict(
    context_length=256, embedding_length=64, attention__head_count=4, attention__key_length=32,
    attention__value_length=32, attention__key_length_swa=16, attention__value_length_swa=16,
    attention__layer_norm_rms_epsilon=0.01, attention__sliding_window=9, rope__freq_base=500.0,
    rope__freq_base_swa=50.0, rope__dimension_count=32, rope__dimension_count_swa=16, vocab_size=96)  # fmt: skip
DENSE = dict(
    block_count=4, feed_forward_length=96, attention__head_count_kv=[2, 1, 2, 1], attention__shared_kv_layers=0,
    attention__sliding_window_pattern=[True, False] * 2, embedding_length_per_layer_input=0,
    final_logit_softcapping=4.0)  # fmt: skip
MANY = dict(
    block_count=6, feed_forward_length=[96] * 4 + [192] * 2, attention__head_count_kv=2, attention__shared_kv_layers=2,
    attention__sliding_window_pattern=[True, False, False, True, True, False], embedding_length_per_layer_input=16,
    final_logit_softcapping=4.0)  # fmt: skip
MIXED = DENSE | dict(expert_count=6, expert_used_count=2, expert_feed_forward_length=32)
CONFIGS = {"dense": (large_heads(), DENSE), "per layer": (PER_LAYER, MANY), "experts": (EXPERTS, MIXED)}
FACTORS = np.float32([1.0] * 4 + [1e30] * 12)


def gguf_name(name):
    """GGUF's name of a Hugging Face tensor."""
    stem, at = name.removesuffix(".weight"), ""
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        at = f"blk.{layer}."
    return f"{at}{STEMS[stem]}" + ("" if STEMS[stem].endswith(".scale") else ".weight")


def write_gemma4(path, config, defaults, factors=FACTORS, is_split=False, is_fused=False, **keys):
    """Writes a file as conversion does: tensors as they are, and the factors of a rope of which most pairs stand
    still. is_split: gate and up of experts are two tensors. is_fused: queries, keys and values are one."""
    stored = {gguf_name(n): a for n, a in tiny.tensors(config, 3).items()} | {"rope_freqs.weight": factors}
    for name in [name for name in stored if is_split and "gate_up_exps" in name]:
        for part, rows in zip(("gate", "up"), np.split(stored.pop(name), 2, axis=1), strict=True):
            stored[name.replace("gate_up", part)] = np.ascontiguousarray(rows)
    if is_fused:
        fuse_attention(stored, config["num_hidden_layers"])
    metadata = {k: v for k, v in {**KEYS, **defaults, **keys}.items() if v is not None}
    return write(path, gguf_bytes(convert.metadata("gemma4", **metadata), plain_tensors(stored)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_computes_the_bits_of_its_folder(name, tmp_path):
    config, defaults = CONFIGS[name]
    folder = load(tiny.write(tmp_path / "folder", config, tiny.tensors(config, 3)))
    file = load(write_gemma4(tmp_path / "m.gguf", config, defaults))
    assert file.config.layers == folder.config.layers and file.config.tied and file.config.logit_cap == 4
    ids = tiny.prompt(config, 40)
    assert logits_of(file, ids).tobytes() == logits_of(folder, ids).tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_queries_keys_and_values_may_be_one_tensor(name, tmp_path):
    config, defaults = CONFIGS[name]
    whole = load(write_gemma4(tmp_path / "whole.gguf", config, defaults))
    fused = load(write_gemma4(tmp_path / "fused.gguf", config, defaults, is_fused=True))
    assert fused.config == whole.config
    ids = tiny.prompt(config, 20)
    assert logits_of(fused, ids).tobytes() == logits_of(whole, ids).tobytes()


def test_gate_and_up_of_experts_may_be_two_tensors(tmp_path):
    config, defaults = CONFIGS["experts"]
    whole = load(write_gemma4(tmp_path / "whole.gguf", config, defaults))
    split, ids = load(write_gemma4(tmp_path / "split.gguf", config, defaults, is_split=True)), tiny.prompt(config, 40)
    assert logits_of(split, ids).tobytes() == logits_of(whole, ids).tobytes()


def test_thetas_and_caps_that_a_file_does_not_name(tmp_path):
    silent = dict(final_logit_softcapping=None, rope__freq_base_swa=None, attention__shared_kv_layers=None)
    made = model_config(open_checkpoint(write_gemma4(tmp_path / "m.gguf", *CONFIGS["dense"], **silent)).config)
    assert made.logit_cap == 0 and made.layers[0].mixer.rope.theta == 1e4 and made.layers[1].mixer.rope.theta == 500
    assert not made.layers[1].mixer.own_values and made.layers[1].mixer.num_kv_heads == 1


REFUSED = [
    (dict(attention__head_count_kv=[2, 1]), r"attention\.head_count_kv: expected 4 whole numbers, found 2"),
    (dict(attention__sliding_window_pattern=[True] * 3), "config key 'layer_types': expected 4 of"),
    (dict(feed_forward_length=[96, 96, 96, 192]), "feed_forward_length .*: expected one width"),
    (dict(rope__dimension_count_swa=8), "rope.dimension_count_swa: only attention.key_length_swa is supported"),
    (dict(attention__value_length_swa=8), "value heads of another size than key heads are not supported"),
    (dict(factors=FACTORS[::-1]), "tensor 'rope_freqs.weight': expected 16 factors, ones and then 1e30"),
    (dict(factors=FACTORS[:9]), "tensor 'rope_freqs.weight': expected 16 factors, ones and then 1e30"),
    (dict(attention__shared_kv_layers=4), "config key 'num_kv_shared_layers'"),
    (dict(attention__clamp_kqv=1.0), r"metadata not supported: gemma4\.attention\.clamp_kqv"),
]


@pytest.mark.parametrize("keys, message", REFUSED)
def test_files_that_do_not_fit_are_refused(keys, message, tmp_path):
    path = write_gemma4(tmp_path / "m.gguf", *CONFIGS["dense"], **keys)
    with pytest.raises(ValueError, match=message):
        model_config(open_checkpoint(path).config)
