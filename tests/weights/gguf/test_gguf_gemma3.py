"""A GGUF file of Gemma 3 computes the same bits as the folder that it was converted from."""

import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from tests.models import tiny
from tests.models.cases import windowed
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write

CONFIG = windowed(query_pre_attn_scalar=32)  # equal to head_dim, as llama.cpp assumes
STEMS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{p}_norm": f"attn_{p}_norm" for p in "qk"},
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
}
KEYS = dict(
    block_count=3, context_length=256, embedding_length=64, feed_forward_length=96, attention__head_count=4,
    attention__head_count_kv=2, attention__key_length=32, attention__value_length=32,
    attention__layer_norm_rms_epsilon=0.01, rope__freq_base=500.0, rope__freq_base_swa=50.0,
    rope__scaling__type="linear", rope__scaling__factor=2.5, attention__sliding_window=9,
    attention__sliding_window_pattern=3)  # fmt: skip


def gguf_name(name):
    """GGUF's name of a Hugging Face tensor."""
    stem, at = name.removesuffix(".weight"), ""
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        at = f"blk.{layer}."
    return f"{at}{STEMS[stem]}.weight"


def write_as(architecture, path, arrays, defaults, **keys):
    """Writes a file as conversion does: norms as 1 + w. defaults, keys: metadata; None leaves a key out."""
    stored = {gguf_name(n): a + np.float32(1) if n.endswith("norm.weight") else a for n, a in arrays.items()}
    metadata = convert.metadata(architecture, **{k: v for k, v in {**defaults, **keys}.items() if v is not None})
    return write(path, gguf_bytes(metadata, plain_tensors(stored)))


def write_gemma3(path, arrays, **keys):
    return write_as("gemma3", path, arrays, KEYS, **keys)


@pytest.fixture(scope="module")
def arrays():
    return tiny.tensors(CONFIG, 3)


def test_a_file_computes_the_bits_of_its_folder(arrays, tmp_path):
    folder, file = (
        load(tiny.write(tmp_path / "folder", CONFIG, arrays)),
        load(write_gemma3(tmp_path / "m.gguf", arrays)),
    )
    assert file.config.layers == folder.config.layers and file.config.tied
    ids = tiny.prompt(CONFIG, 40)
    assert logits_of(file, ids).tobytes() == logits_of(folder, ids).tobytes()


def test_what_llama_cpp_knows_by_heart(arrays, tmp_path):
    silent = dict(rope__freq_base_swa=None, attention__sliding_window_pattern=None, rope__scaling__type=None)
    path = write_gemma3(tmp_path / "m.gguf", arrays, **silent, rope__scaling__factor=None)
    config = open_checkpoint(path).config
    assert config["rope_local_base_freq"] == 1e4 and config["sliding_window_pattern"] == 6
    layers = model_config(config).layers
    assert {layer.mixer.window for layer in layers} == {9} and {layer.mixer.scale for layer in layers} == {32**-0.5}


def test_caps_of_zero_are_none(arrays, tmp_path):
    zero = dict(final_logit_softcapping=0.0, attn_logit_softcapping=0.0)
    assert model_config(open_checkpoint(write_gemma3(tmp_path / "m.gguf", arrays, **zero)).config).layers
    with pytest.raises(ValueError, match=r"metadata not supported: gemma3\.final_logit_softcapping"):
        open_checkpoint(write_gemma3(tmp_path / "m.gguf", arrays, final_logit_softcapping=30.0))


def test_a_size_of_heads_is_named_where_it_is_wrong(arrays, tmp_path):
    path = write_gemma3(tmp_path / "m.gguf", arrays, attention__key_length=513, attention__value_length=513)
    with pytest.raises(ValueError, match="head_dim 513 is not supported: it must be a multiple of 16"):
        model_config(open_checkpoint(path).config)


def test_windows_said_for_each_layer(arrays, tmp_path):
    path = write_gemma3(tmp_path / "m.gguf", arrays, attention__sliding_window_pattern=[True, False, True])
    assert [layer.window for layer in model_config(open_checkpoint(path).config).layers] == [9, 0, 9]
    path = write_gemma3(tmp_path / "m.gguf", arrays, attention__sliding_window_pattern=[True, False])
    with pytest.raises(ValueError, match="config key 'layer_types': expected 3 of"):
        model_config(open_checkpoint(path).config)


def test_the_largest_model_has_another_scale(arrays, tmp_path):
    many = {n.replace("layers.0.", f"layers.{i}."): a for i in range(62) for n, a in arrays.items() if "layers.0." in n}
    others = {n: a for n, a in arrays.items() if "layers." not in n}
    path = write_gemma3(tmp_path / "m.gguf", many | others, block_count=62)
    assert open_checkpoint(path).config["query_pre_attn_scalar"] == 64 // 4
