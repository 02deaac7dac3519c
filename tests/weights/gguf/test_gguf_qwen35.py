"""A GGUF file of Qwen3.5, with its recurrent layers, gives back the checkpoint it was converted from."""

import numpy as np
import pytest

from lockstep.formats import Q4_0, Q4_K, Q8_0
from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.fuzz import mutations
from tests.weights.gguf.gguf_models import assert_same_qwen35, qwen35_tensors, write_qwen35


@pytest.mark.parametrize("num_keys, num_values, mtp", [(2, 2, True), (2, 4, True), (2, 6, False), (1, 3, False)])
def test_qwen35(num_keys, num_values, mtp, tmp_path):
    expected = qwen35_tensors(np.random.default_rng(11), num_keys, num_values, mtp=mtp)
    checkpoint = open_checkpoint(write_qwen35(tmp_path / "m.gguf", expected, num_keys, num_values))
    assert_same_qwen35(checkpoint, expected)
    config = checkpoint.config
    assert config["model_type"] == "qwen3_5_text" and config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert (config["linear_num_key_heads"], config["linear_num_value_heads"]) == (num_keys, num_values)
    assert (config["linear_key_head_dim"], config["linear_value_head_dim"]) == (32, 32)
    assert config["linear_conv_kernel_dim"] == 4 and config["mtp_num_hidden_layers"] == int(mtp)
    assert config["head_dim"] == 16 and config["tie_word_embeddings"]
    assert config["rope_parameters"] == {
        "rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }  # fmt: skip


def test_qwen35_heads_that_turn_whole(tmp_path):
    tensors, path = qwen35_tensors(np.random.default_rng(12), 2, 2, mtp=False), tmp_path / "m.gguf"
    config = open_checkpoint(write_qwen35(path, tensors, 2, 2, rope__dimension_count=16)).config
    assert model_config(config).layers[3].mixer.rope.dim == 16  # the default factor is a quarter
    with pytest.raises(ValueError, match=r"qwen35\.rope\.dimension_sections must be an array of numbers, found 11"):
        open_checkpoint(write_qwen35(path, tensors, 2, 2, rope__dimension_sections=11))


def test_qwen35_layer_types_by_interval(tmp_path):
    tensors = qwen35_tensors(np.random.default_rng(12), 2, 2, mtp=False)
    path = write_qwen35(tmp_path / "m.gguf", tensors, 2, 2, attention__recurrent_layers=None)
    assert open_checkpoint(path).config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize("block", [Q8_0, Q4_0])
def test_qwen35_columns_of_blocks_move_whole(block, tmp_path):
    rng, name = np.random.default_rng(13), "model.layers.0.linear_attn.out_proj.weight"
    tensors = qwen35_tensors(rng, 2, 4, mtp=False)
    weights = tensors.pop(name).astype(np.float32)
    raw = block.quantize(convert.tile_heads(weights, 1, 2, 4)).tobytes()
    format = block.name
    path = write_qwen35(tmp_path / "m.gguf", tensors, 2, 4, packed={"blk.0.ssm_out.weight": (format, (32, 128), raw)})
    tensor = open_checkpoint(path).tensors[name]
    assert tensor.format == format and (tensor.data == block.quantize(weights)).all()


def test_qwen35_blocks_that_span_heads_stay_and_the_norm_puts_heads_in_their_order(tmp_path):
    """Value heads of 64 in k-quant blocks of 256, against the same weights as float32, whose columns moved."""
    rng, name = np.random.default_rng(14), "model.layers.0.linear_attn.out_proj.weight"
    tensors = qwen35_tensors(rng, 2, 4, size=64, mtp=False)
    raw = rng.integers(0, 256, (32, 144), np.uint8)
    raw[:, [1, 3]], raw[:, [0, 2]] = 0x1C, 0
    tensors[name] = convert.tile_heads(Q4_K.dequantize(raw), 1, 2, 4)  # two groups of two: its own inverse
    write_qwen35(tmp_path / "moved.gguf", tensors, 2, 4, size=64)
    del tensors[name]
    packed = {"blk.0.ssm_out.weight": ("q4_k", (32, 256), raw.tobytes())}
    stayed = open_checkpoint(write_qwen35(tmp_path / "stayed.gguf", tensors, 2, 4, size=64, packed=packed))
    assert stayed.tensors[name].format == "q4_k" and (stayed.tensors[name].data == raw).all()
    ids = rng.integers(3, 40, 50).tolist()
    expected, found = (logits_of(load(tmp_path / f"{which}.gguf", "f32"), ids) for which in ("moved", "stayed"))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_decay_that_is_no_bfloat16_logarithm(tmp_path):
    tensors = qwen35_tensors(np.random.default_rng(15), 2, 2, mtp=False)
    name = "model.layers.0.linear_attn.A_log"
    tensors[name] = np.float32([0.1234567, -1.7654321])
    found = open_checkpoint(write_qwen35(tmp_path / "m.gguf", tensors, 2, 2)).tensors[name].to_f32()
    assert np.abs(found - tensors[name]).max() < 2e-7
    tensors[name] = np.float32([np.nan, 1])
    with pytest.raises(ValueError, match=r"'blk\.0\.ssm_a'.*all negative"):
        open_checkpoint(write_qwen35(tmp_path / "m.gguf", tensors, 2, 2)).tensors[name]


def test_damaged_files_only_raise_value_errors(tmp_path):
    tensors = {name: array for name, array in qwen35_tensors(np.random.default_rng(20), 1, 2).items()}
    content = write_qwen35(tmp_path / "m.gguf", tensors, 1, 2).read_bytes()
    head = content.index(b"token_embd.weight") + 4000

    def read(path):
        path.write_bytes(path.read_bytes() + content[head:])
        for tensor in open_checkpoint(path).tensors.values():
            tensor.to_f32()

    mutations(content[:head], tmp_path / "m.gguf", read, rounds=150, seed=5)
