"""GGUF files of the text parts of Qwen models that also see, whose vision is in a file of its own."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.running import load, logits_of
from tests.models.test_qwen_vision import apart
from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write
from tests.weights.gguf.gguf_models import stored

SIZES = dict(
    vocab_size=96, block_count=3,
    context_length=256, embedding_length=64, feed_forward_length=96, attention__head_count=4,
    attention__head_count_kv=2, rope__freq_base=500.0)  # fmt: skip
HEADS = dict(attention__key_length=32, attention__value_length=32, n_deepstack_layers=1)
EXPERTS = dict(expert_count=16, expert_used_count=3, expert_feed_forward_length=48, attention__head_count_kv=1)
FILES = {
    "qwen2_vl of ollama": ("qwen25vl", dict(vision__block_count=2)),
    "qwen2_vl": ("qwen2vl", dict(rope__dimension_sections=[4, 2, 2, 0])),
    "qwen3_vl": ("qwen3vl", dict(rope__dimension_sections=[6, 5, 5, 0], **HEADS)),
    "qwen3_vl_moe": ("qwen3vlmoe", dict(rope__dimension_sections=[6, 5, 5, 0], **HEADS, **EXPERTS)),
}


EPS = dict(attention__layer_norm_rms_epsilon=0.01)


def all_with_experts(name):
    """A case whose layers all have experts, if one has: GGUF cannot say otherwise."""
    config = CASES[name]
    if "text_config" in config:
        text = {k: v for k, v in config["text_config"].items() if k != "mlp_only_layers"}
        config = {**config, "text_config": text}
    return config


def write_vision(path, config, tensors, architecture, values):
    """The GGUF file of a text part's tensors, whose experts may be stacked and transposed."""
    named = convert.stacked_experts(apart(tensors), 3, False)
    for name, array in apart(tensors).items():
        if ".experts." not in name:
            plain = name.replace("model.language_model.", "model.")
            named[convert.gguf_name(plain, 3, "ffn_norm")] = stored(name, array)
    eps = dict(attention__layer_norm_rms_epsilon=tiny.text_part(config)["rms_norm_eps"])
    metadata = convert.metadata(architecture, **SIZES | eps | values) | convert.NO_VOCABULARY
    return write(path, gguf_bytes(metadata, plain_tensors(named)))


@pytest.mark.parametrize("name", FILES)
def test_a_gguf_file_computes_what_its_checkpoint_does(name, tmp_path):
    (architecture, values), name = FILES[name], name.split()[0]
    config = all_with_experts(name)
    tensors = {n: array.astype(ml_dtypes.bfloat16) for n, array in tiny.tensors(config, 3).items()}
    path = write_vision(tmp_path / "m.gguf", config, tensors, architecture, values)
    found, expected = open_checkpoint(path).config, model_config(config)
    assert model_config(found).layers == expected.layers and found["model_type"] == f"{name}_text"
    folder, ids = tiny.write(tmp_path / "hf", config, tensors, "BF16"), tiny.prompt(config, 20)
    assert (logits_of(load(path), ids) == logits_of(load(folder), ids)).all()


def test_sections_must_be_numbers(tmp_path):
    named = {"token_embd.weight": np.zeros((96, 64), np.float32)}
    named |= {f"blk.{i}.ffn_up.weight": np.zeros((96, 64), np.float32) for i in range(3)}
    metadata = convert.metadata("qwen3vl", **SIZES | HEADS, **EPS, rope__dimension_sections=8)
    path = write(tmp_path / "m.gguf", gguf_bytes(metadata, plain_tensors(named)))
    with pytest.raises(ValueError, match=r"qwen3vl\.rope\.dimension_sections must be an array of numbers, found 8"):
        open_checkpoint(path)
