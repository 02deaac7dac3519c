"""A GGUF file gives back the Hugging Face checkpoint that it was converted from: names, config and every value."""

import numpy as np
import pytest

from lockstep.formats import Q4_0, Q8_0
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights.gguf.rope import llama3_scaling
from tests.weights import convert
from tests.weights.files import FLOAT32, STRING, UINT32, gguf_bytes, plain_tensors, write
from tests.weights.gguf.gguf_models import LLAMA, assert_same, dense_tensors, draw, rotary, write_dense


@pytest.mark.parametrize(
    "architecture, model_type, options, change",
    [
        ("llama", "llama", {}, rotary),
        ("llama", "llama", {"biases": True, "tied": False}, rotary),
        ("llama", "llama", {"mlp_biases": True}, rotary),
        ("smollm3", "smollm3", {}, rotary),
        ("qwen2", "qwen2", {"biases": True}, lambda name, array: array),
        ("qwen3", "qwen3", {"head_norms": True, "tied": False}, lambda name, array: array),
    ],
)
def test_dense_architectures(architecture, model_type, options, change, tmp_path):
    expected = dense_tensors(np.random.default_rng(5), **options)
    checkpoint = open_checkpoint(write_dense(tmp_path / "m.gguf", expected, architecture, change=change))
    assert_same(checkpoint, expected)
    config = checkpoint.config
    assert config["model_type"] == model_type and config["vocab_size"] == 40
    assert config["tie_word_embeddings"] == options.get("tied", True)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 500000.0 and config["rope_scaling"] is None
    assert config["num_hidden_layers"] == 2 and config["intermediate_size"] == 64
    assert config.get("attention_bias", True) == options.get("biases", architecture == "qwen2")
    assert config.get("mlp_bias", False) == options.get("mlp_biases", False)
    if architecture == "smollm3":
        assert config["no_rope_layers"] == [1, 1] and config["no_rope_layer_interval"] == 4


@pytest.mark.parametrize(
    "architecture, options, change",
    [
        ("llama", {"biases": True}, rotary),
        ("qwen2", {"biases": True}, lambda name, array: array),
        ("qwen3", {"head_norms": True}, lambda name, array: array),
    ],
)
def test_queries_keys_and_values_may_be_one_tensor(architecture, options, change, tmp_path):
    expected = dense_tensors(np.random.default_rng(5), **options)
    checkpoint = open_checkpoint(write_dense(tmp_path / "m.gguf", expected, architecture, change=change, fused=True))
    assert_same(checkpoint, expected)
    assert checkpoint.config.get("attention_bias", True) == options.get("biases", False)


def test_a_fused_tensor_of_another_size_is_refused(tmp_path):
    tensors = dense_tensors(np.random.default_rng(5))
    with pytest.raises(ValueError, match=r"attn_qkv.weight' \[64, 32\]: expected 128 rows of queries, keys and values"):
        open_checkpoint(write_dense(tmp_path / "m.gguf", tensors, "llama", fused=True, attention__head_count_kv=4,
                                    attention__key_length=8, attention__head_count=8))  # fmt: skip


@pytest.mark.parametrize("block", [Q8_0, Q4_0])
def test_rotary_rows_of_blocks(block, tmp_path):
    tensors = dense_tensors(np.random.default_rng(6))
    weights = tensors.pop("model.layers.0.self_attn.q_proj.weight").astype(np.float32)
    packed = block.quantize(convert.interleave_rotary(weights, 4))
    extra = {"blk.0.attn_q.weight": (block.name, (32, 32), packed.tobytes())}
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", extra, rotary)
    tensor = open_checkpoint(path).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert (tensor.data == block.quantize(weights)).all() and tensor.shape == (32, 32)


def test_rope_scaling(tmp_path):
    tensors = dense_tensors(np.random.default_rng(7))
    config = lambda **values: open_checkpoint(
        write_dense(tmp_path / "m.gguf", tensors, "llama", change=rotary, **values)
    ).config["rope_scaling"]
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert config(**linear) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope__scaling__original_context_length": 4096, "rope__scaling__yarn_beta_fast": 24.0}
    assert config(**{**linear, **yarn, "rope__scaling__type": "yarn"}) == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0
    }  # fmt: skip
    with pytest.raises(ValueError, match="'longrope' is not supported"):
        config(rope__scaling__type="longrope")  # the file has no factors


def llama3_factors(factor, context=8192, low=1.0, high=4.0, size=8):
    """The tensor rope_freqs.weight as conversion writes it: float32 [head size / 2]."""
    frequencies = 1 / 500000 ** (np.arange(0, size, 2) / size)
    lengths = 2 * np.pi / frequencies
    smooth = (context / lengths - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < context / high, 1, np.where(lengths > context / low, factor, middle)).astype(np.float32)


def test_llama3_rope_factors(tmp_path):
    tensors = dense_tensors(np.random.default_rng(8))
    extra = plain_tensors({"rope_freqs.weight": llama3_factors(32.0)})
    scaling = open_checkpoint(write_dense(tmp_path / "m.gguf", tensors, "llama", extra, rotary)).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    for factors in (
        np.float32([1, 2, 3, 4]),
        np.float32([1, 1, 8]),
        np.float32([np.nan] * 4),
        np.float32([0, 0, 0, 0]),
    ):
        path = write_dense(tmp_path / "m.gguf", tensors, "llama", plain_tensors({"rope_freqs.weight": factors}), rotary)
        with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "context, high", [(4096, 4.0), (2048, 4.0), (131072, 4.0), (1500, 4.0), (8192, 8.0), (700, 2.5)]
)
def test_llama3_rope_of_another_context(context, high, tmp_path):
    """The recovered parameters rotate each pair as far as those that the factors were made from."""
    found = llama3_scaling(500000.0, 64, llama3_factors(32.0, context, 1.0, high, 64), 8192, "m.gguf")
    assert (found["original_max_position_embeddings"], found["high_freq_factor"]) == (context, high)
    doubled = llama3_scaling(500000.0, 64, llama3_factors(32.0, context, 2.0, high + 4, 64), 8192, "m.gguf")
    assert doubled["low_freq_factor"] == 1.0
    again = llama3_factors(32.0, doubled["original_max_position_embeddings"], 1.0, doubled["high_freq_factor"], 64)
    assert np.allclose(again, llama3_factors(32.0, context, 2.0, high + 4, 64), rtol=1e-3)


def test_an_original_context_in_the_metadata_is_tried_first(tmp_path):
    """In small heads only one pair has a factor between the ends, too few to solve for an unusual context."""
    extra = plain_tensors({"rope_freqs.weight": llama3_factors(32.0, 9000)})
    values, tensors = {"rope__scaling__original_context_length": 9000}, dense_tensors(np.random.default_rng(8))
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", extra, rotary, **values)
    assert open_checkpoint(path).config["rope_scaling"]["original_max_position_embeddings"] == 9000
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        open_checkpoint(write_dense(tmp_path / "m.gguf", tensors, "llama", extra, rotary))


@pytest.mark.parametrize("number, pooling", [(0, None), (1, "mean"), (3, "last"), (None, None)])
def test_pooling(number, pooling, tmp_path):
    values = {} if number is None else {"pooling_type": number}
    path = write_dense(tmp_path / "m.gguf", dense_tensors(np.random.default_rng(9)), "llama", change=rotary, **values)
    assert open_checkpoint(path).config.get("pooling_type") == pooling


def test_a_sliding_window_makes_it_mistral(tmp_path):
    tensors = dense_tensors(np.random.default_rng(9))
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", change=rotary, attention__sliding_window=4096)
    config = open_checkpoint(path).config
    assert config["model_type"] == "mistral" and config["sliding_window"] == 4096


def test_experts(tmp_path):
    rng = np.random.default_rng(10)
    expected = {name: array for name, array in dense_tensors(rng, head_norms=True).items() if ".mlp." not in name}
    stacks = {}
    for layer in range(2):
        expected[f"model.layers.{layer}.mlp.gate.weight"] = draw(rng, 3, 32)
        for name, shape in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16))):
            experts = [draw(rng, *shape) for _ in range(3)]
            stacks[f"blk.{layer}.ffn_{name}_exps.weight"] = np.stack(experts)
            for index, expert in enumerate(experts):
                expected[f"model.layers.{layer}.mlp.experts.{index}.{name}_proj.weight"] = expert
    counts = dict(expert_count=3, expert_used_count=2, expert_feed_forward_length=16)
    plain = {name: array for name, array in expected.items() if ".experts." not in name}
    path = write_dense(tmp_path / "m.gguf", plain, "qwen3moe", plain_tensors(stacks), **counts)
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, expected)
    config = checkpoint.config
    assert config["model_type"] == "qwen3_moe" and config["num_experts"] == 3 and config["num_experts_per_tok"] == 2
    assert config["moe_intermediate_size"] == 16 and config["norm_topk_prob"] is True
    with pytest.raises(ValueError, match="expected a stack of 4 experts"):
        open_checkpoint(write_dense(path, plain, "qwen3moe", plain_tensors(stacks), **{**counts, "expert_count": 4}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"attention__scale": 0.5}, "metadata not supported: llama.attention.scale"),
        ({"logit_scale": 0.5, "residual_scale": 2.0}, "not supported: llama.logit_scale, llama.residual_scale"),
        ({"expert_count": 8}, "not supported: llama.expert_count"),
        ({"attention__causal": False}, "not supported: llama.attention.causal"),
        ({"block_count": "two"}, "llama.block_count must be a whole number, found 'two'"),
        ({"attention__head_count": 0}, "0 heads"),
        ({"attention__head_count": [4, 4, 2]}, "attention.head_count differs between layers"),
        ({"attention__value_length": 4}, "value heads of another size"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "must be a finite number"),
        ({"rope__dimension_count": 7}, "rope.dimension_count 7"),
        ({"block_count": 1 << 30}, "1073741824 layers do not fit a file of 20 tensors"),
        ({"block_count": 0}, "0 layers do not fit"),
        ({"rope__freq_base": 0.0}, "base 0.0"),
        ({"pooling_type": 2}, "pooling_type cls is not supported, only none, mean and last"),
        ({"pooling_type": 4}, "pooling_type rank is not supported"),
        ({"pooling_type": 9}, "pooling_type 9 is not supported"),
    ],
)
def test_metadata_that_is_not_understood(values, message, tmp_path):
    tensors = dense_tensors(np.random.default_rng(16))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write_dense(tmp_path / "m.gguf", tensors, "llama", change=rotary, **values))


def test_usual_values_of_keys_that_would_matter(tmp_path):
    usual = {"expert_count": 0, "attention__causal": True, "attention__head_count": [4, 4]}
    tensors = dense_tensors(np.random.default_rng(17))
    checkpoint = open_checkpoint(write_dense(tmp_path / "m.gguf", tensors, "llama", change=rotary, **usual))
    assert checkpoint.config["num_attention_heads"] == 4


def test_architectures_and_tensors_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match="architecture 'gemma' is not supported, only gemma2, "):
        open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes({"general.architecture": (STRING, "gemma")}, {})))
    with pytest.raises(ValueError, match="architecture None is not supported"):
        open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes({}, {})))
    extra = plain_tensors({"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    path = write_dense(tmp_path / "m.gguf", dense_tensors(np.random.default_rng(18)), "llama", extra, rotary)
    with pytest.raises(ValueError, match=r"tensor 'blk\.0\.attn_sinks\.weight'.*is not one that architecture 'llama'"):
        open_checkpoint(path)


def test_a_tensor_whose_shape_does_not_fit_the_heads(tmp_path):
    tensors = dense_tensors(np.random.default_rng(19))
    tensors["model.layers.0.self_attn.q_proj.weight"] = draw(np.random.default_rng(19), 30, 32)
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", attention__key_length=8)
    with pytest.raises(ValueError, match=r"tensor 'blk\.0\.attn_q\.weight' \[30, 32\]"):
        open_checkpoint(path).tensors["model.layers.0.self_attn.q_proj.weight"]


def test_token_ids_of_the_metadata(tmp_path):
    metadata = convert.metadata("llama", **LLAMA) | {
        "tokenizer.ggml.bos_token_id": (UINT32, 1), "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "unrelated.key": (FLOAT32, 1.0),
    }  # fmt: skip
    names = ("token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight")
    tensors = plain_tensors(dict.fromkeys(names, np.zeros((40, 32), np.float32)))
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes(metadata, tensors)))
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert checkpoint.metadata["unrelated.key"] == 1.0
    metadata["tokenizer.ggml.bos_token_id"] = (UINT32, 0xFFFFFFFF)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes(metadata, tensors)))
    assert checkpoint.generation_config == {"eos_token_id": 2}
