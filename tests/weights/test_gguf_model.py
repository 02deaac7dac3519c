"""A GGUF file gives back the Hugging Face checkpoint it was converted from: names, config and every value."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.models.families import model_config
from lockstep.weights import q4_0, q8_0
from lockstep.weights.checkpoint import open_checkpoint
from lockstep.weights.gguf_rope import llama3_scaling
from tests.weights import convert
from tests.weights.files import FLOAT32, STRING, UINT32, gguf_bytes, plain_tensors, write
from tests.weights.fuzz import mutations

BF16 = ml_dtypes.bfloat16
LLAMA = dict(
    block_count=2, context_length=128, embedding_length=32, feed_forward_length=64, attention__head_count=4,
    attention__head_count_kv=2, attention__layer_norm_rms_epsilon=1e-5, rope__dimension_count=8, vocab_size=40,
    rope__freq_base=500000.0)  # fmt: skip


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32).astype(BF16)


def dense_tensors(rng, head_norms=False, biases=False, tied=True, mlp_biases=False):
    """A two-layer decoder: width 32, 4 heads of 8, 2 kv heads."""
    tensors = {"model.embed_tokens.weight": draw(rng, 40, 32), "model.norm.weight": draw(rng, 32)}
    if not tied:
        tensors["lm_head.weight"] = draw(rng, 40, 32)
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            tensors[f"{at}self_attn.{name}.weight"] = draw(rng, rows, 32)
            if biases and name != "o_proj":
                tensors[f"{at}self_attn.{name}.bias"] = draw(rng, rows)
        for name in ("q_norm", "k_norm") if head_norms else ():
            tensors[f"{at}self_attn.{name}.weight"] = draw(rng, 8)
        for name, shape in (("gate_proj", (64, 32)), ("up_proj", (64, 32)), ("down_proj", (32, 64))):
            tensors[f"{at}mlp.{name}.weight"] = draw(rng, *shape)
            if mlp_biases:
                tensors[f"{at}mlp.{name}.bias"] = draw(rng, shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = draw(rng, 32)
    return tensors


def stored(name, array):
    """Vectors become float32 in GGUF, matrices keep their format."""
    return array.astype(np.float32) if array.ndim == 1 or name.endswith(("conv1d.weight", "A_log")) else array


def write_dense(path, tensors, architecture, extra=None, change=lambda name, array: array, **values):
    named = {}
    for name, array in tensors.items():
        gguf = convert.gguf_name(name, 2, "ffn_norm")
        named[gguf] = stored(name, change(name, array))
    metadata = convert.metadata(architecture, **{**LLAMA, **values})
    return write(path, gguf_bytes(metadata, {**plain_tensors(named), **(extra or {})}))


def rotary(name, array):
    heads = {"q_proj": 4, "k_proj": 2}
    return convert.interleave_rotary(array, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else array


def assert_same(checkpoint, expected):
    assert set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        tensor, info = checkpoint.tensors[name], checkpoint.tensors.info[name]
        assert tensor.name == info.name == name
        assert tensor.shape == info.shape == array.shape and tensor.format == info.format, name
        assert tensor.data.nbytes == info.num_bytes and not tensor.data.flags.writeable
        assert (tensor.to_f32() == array.astype(np.float32)).all(), name


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


@pytest.mark.parametrize("block", [q8_0, q4_0])
def test_rotary_rows_of_blocks(block, tmp_path):
    tensors = dense_tensors(np.random.default_rng(6))
    weights = tensors.pop("model.layers.0.self_attn.q_proj.weight").astype(np.float32)
    packed = block.quantize(convert.interleave_rotary(weights, 4))
    extra = {"blk.0.attn_q.weight": (block.__name__.rpartition(".")[2], (32, 32), packed.tobytes())}
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", extra, rotary)
    tensor = open_checkpoint(path).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert (tensor.data == block.quantize(weights)).all() and tensor.shape == (32, 32)


def test_rope_scaling(tmp_path):
    tensors = dense_tensors(np.random.default_rng(7))
    config = lambda **values: open_checkpoint(  # noqa: E731
        write_dense(tmp_path / "m.gguf", tensors, "llama", change=rotary, **values)
    ).config["rope_scaling"]
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert config(**linear) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope__scaling__original_context_length": 4096, "rope__scaling__yarn_beta_fast": 24.0}
    assert config(**{**linear, **yarn, "rope__scaling__type": "yarn"}) == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0
    }  # fmt: skip
    with pytest.raises(ValueError, match="'longrope' is not supported"):
        config(rope__scaling__type="longrope")


def llama3_factors(factor, context=8192, low=1.0, high=4.0, size=8):
    """As conversion writes them: float32 [head size / 2]."""
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
        with pytest.raises(ValueError, match="rope_freqs.weight"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "context, high", [(4096, 4.0), (2048, 4.0), (131072, 4.0), (1500, 4.0), (8192, 8.0), (700, 2.5)]
)
def test_llama3_rope_of_another_context(context, high, tmp_path):
    """What is inferred turns each pair as far as what the factors were made of."""
    found = llama3_scaling(500000.0, 64, llama3_factors(32.0, context, 1.0, high, 64), 8192, "m.gguf")
    assert (found["original_max_position_embeddings"], found["high_freq_factor"]) == (context, high)
    doubled = llama3_scaling(500000.0, 64, llama3_factors(32.0, context, 2.0, high + 4, 64), 8192, "m.gguf")
    assert doubled["low_freq_factor"] == 1.0
    again = llama3_factors(32.0, doubled["original_max_position_embeddings"], 1.0, doubled["high_freq_factor"], 64)
    assert np.allclose(again, llama3_factors(32.0, context, 2.0, high + 4, 64), rtol=1e-3)


def test_an_original_context_in_the_metadata_is_tried_first(tmp_path):
    """With heads this small only one pair lies between the ends, too few to find an unusual context by."""
    extra = plain_tensors({"rope_freqs.weight": llama3_factors(32.0, 9000)})
    values, tensors = {"rope__scaling__original_context_length": 9000}, dense_tensors(np.random.default_rng(8))
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", extra, rotary, **values)
    assert open_checkpoint(path).config["rope_scaling"]["original_max_position_embeddings"] == 9000
    with pytest.raises(ValueError, match="rope_freqs.weight"):
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


def qwen35_tensors(rng, num_keys, num_values, size=32, mtp=True):
    """Four layers (three linear, one full), width 32, delta heads of `size`, kernel 4."""
    key_rows, value_rows = num_keys * size, num_values * size
    tensors = {"model.embed_tokens.weight": draw(rng, 40, 32), "model.norm.weight": draw(rng, 32)}
    for layer in range(4):
        at = f"model.layers.{layer}."
        if layer != 3:
            linear = {
                "in_proj_qkv.weight": (2 * key_rows + value_rows, 32), "in_proj_z.weight": (value_rows, 32),
                "in_proj_a.weight": (num_values, 32), "in_proj_b.weight": (num_values, 32),
                "out_proj.weight": (32, value_rows), "conv1d.weight": (2 * key_rows + value_rows, 1, 4),
                "A_log": (num_values,), "dt_bias": (num_values,), "norm.weight": (size,),
            }  # fmt: skip
            tensors |= {f"{at}linear_attn.{name}": draw(rng, *shape) for name, shape in linear.items()}
        else:
            tensors |= full_attention(rng, at)
        tensors |= block_tensors(rng, at)
    if mtp:
        tensors |= {
            f"mtp.{name}.weight": draw(rng, 32) for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        }
        tensors |= {"mtp.fc.weight": draw(rng, 32, 64)}
        tensors |= full_attention(rng, "mtp.layers.0.") | block_tensors(rng, "mtp.layers.0.")
    return tensors


def full_attention(rng, at):
    shapes = {
        "q_proj": (128, 32),
        "k_proj": (32, 32),
        "v_proj": (32, 32),
        "o_proj": (32, 64),
        "q_norm": (16,),
        "k_norm": (16,),
    }
    return {f"{at}self_attn.{name}.weight": draw(rng, *shape) for name, shape in shapes.items()}


def block_tensors(rng, at):
    shapes = {"mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64), "input_layernorm": (32,),
              "post_attention_layernorm": (32,)}  # fmt: skip
    return {f"{at}{name}.weight": draw(rng, *shape) for name, shape in shapes.items()}


def write_qwen35(path, tensors, num_keys, num_values, size=32, packed=None, **values):
    mtp = any(name.startswith("mtp.") for name in tensors)
    named = {}
    for name, array in tensors.items():
        converted = convert.convert_qwen35(name, array, num_keys, num_values, 2 * num_keys * size)
        named[convert.gguf_name(name, 4, "post_attention_norm")] = stored(name, converted)
    keys = {
        **LLAMA, "block_count": 4 + mtp, "attention__key_length": 16, "attention__value_length": 16,
        "rope__dimension_count": 4, "rope__dimension_sections": [11, 11, 10, 0], "ssm__conv_kernel": 4,
        "ssm__state_size": size, "ssm__group_count": num_keys, "ssm__time_step_rank": num_values,
        "ssm__inner_size": num_values * size, "full_attention_interval": 4,
        "attention__recurrent_layers": [True, True, True, False] + [False] * mtp,
        **({"nextn_predict_layers": 1} if mtp else {}), **values,
    }  # fmt: skip
    metadata = convert.metadata("qwen35", **{key: value for key, value in keys.items() if value is not None})
    return write(path, gguf_bytes(metadata, {**plain_tensors(named), **(packed or {})}))


def assert_same_qwen35(checkpoint, expected):
    """As assert_same, but a norm w comes back as what 1 + w kept of it, which gives the same 1 + w."""
    assert set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        tensor, info = checkpoint.tensors[name], checkpoint.tensors.info[name]
        assert tensor.shape == info.shape == array.shape and tensor.format == info.format, name
        found, wanted = tensor.to_f32(), array.astype(np.float32)
        is_norm = name.endswith("norm.weight") or "_norm_" in name
        one = np.float32(1 if is_norm and "linear_attn" not in name else 0)
        assert (found + one == wanted + one).all(), name
        assert not tensor.data.flags.writeable


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
    assert model_config(config).rope_dim == 16  # a silent config means a quarter
    with pytest.raises(ValueError, match="qwen35.rope.dimension_sections must be an array of numbers, found 11"):
        open_checkpoint(write_qwen35(path, tensors, 2, 2, rope__dimension_sections=11))


def test_qwen35_layer_types_by_interval(tmp_path):
    tensors = qwen35_tensors(np.random.default_rng(12), 2, 2, mtp=False)
    path = write_qwen35(tmp_path / "m.gguf", tensors, 2, 2, attention__recurrent_layers=None)
    assert open_checkpoint(path).config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]


@pytest.mark.parametrize("block", [q8_0, q4_0])
def test_qwen35_columns_of_blocks_move_whole(block, tmp_path):
    rng, name = np.random.default_rng(13), "model.layers.0.linear_attn.out_proj.weight"
    tensors = qwen35_tensors(rng, 2, 4, mtp=False)
    weights = tensors.pop(name).astype(np.float32)
    raw = block.quantize(convert.tile_heads(weights, 1, 2, 4)).tobytes()
    format = block.__name__.rpartition(".")[2]
    path = write_qwen35(tmp_path / "m.gguf", tensors, 2, 4, packed={"blk.0.ssm_out.weight": (format, (32, 128), raw)})
    tensor = open_checkpoint(path).tensors[name]
    assert tensor.format == format and (tensor.data == block.quantize(weights)).all()


def test_qwen35_columns_across_blocks_become_float32(tmp_path):
    """Value heads of 64 in k-quant blocks of 256: a block spans heads, so the weights move, not blocks."""
    rng, name = np.random.default_rng(14), "model.layers.0.linear_attn.out_proj.weight"
    tensors = qwen35_tensors(rng, 2, 4, size=64, mtp=False)
    del tensors[name]
    raw = rng.integers(0, 256, (32, 144), np.uint8)
    raw[:, [1, 3]] &= 0x3B
    packed = {"blk.0.ssm_out.weight": ("q4_k", (32, 256), raw.tobytes())}
    checkpoint = open_checkpoint(write_qwen35(tmp_path / "m.gguf", tensors, 2, 4, size=64, packed=packed))
    tensor, info = checkpoint.tensors[name], checkpoint.tensors.info[name]
    assert tensor.format == info.format == "f32" and tensor.shape == info.shape and tensor.data.nbytes == info.num_bytes
    from lockstep.weights import q4_k

    assert (convert.tile_heads(tensor.data, 1, 2, 4) == q4_k.dequantize(raw)).all()


def test_decay_that_is_no_bfloat16_logarithm(tmp_path):
    tensors = qwen35_tensors(np.random.default_rng(15), 2, 2, mtp=False)
    name = "model.layers.0.linear_attn.A_log"
    tensors[name] = np.float32([0.1234567, -1.7654321])
    found = open_checkpoint(write_qwen35(tmp_path / "m.gguf", tensors, 2, 2)).tensors[name].to_f32()
    assert np.abs(found - tensors[name]).max() < 2e-7
    tensors[name] = np.float32([np.nan, 1])
    with pytest.raises(ValueError, match="'blk.0.ssm_a'.*all negative"):
        open_checkpoint(write_qwen35(tmp_path / "m.gguf", tensors, 2, 2)).tensors[name]


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
    with pytest.raises(ValueError, match="architecture 'gemma3' is not supported, only llama, "):
        open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes({"general.architecture": (STRING, "gemma3")}, {})))
    with pytest.raises(ValueError, match="architecture None is not supported"):
        open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes({}, {})))
    extra = plain_tensors({"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    path = write_dense(tmp_path / "m.gguf", dense_tensors(np.random.default_rng(18)), "llama", extra, rotary)
    with pytest.raises(ValueError, match="tensor 'blk.0.attn_sinks.weight'.*is not one that architecture 'llama'"):
        open_checkpoint(path)


def test_a_tensor_whose_shape_does_not_fit_the_heads(tmp_path):
    tensors = dense_tensors(np.random.default_rng(19))
    tensors["model.layers.0.self_attn.q_proj.weight"] = draw(np.random.default_rng(19), 30, 32)
    path = write_dense(tmp_path / "m.gguf", tensors, "llama", attention__key_length=8)
    with pytest.raises(ValueError, match=r"tensor 'blk.0.attn_q.weight' \[30, 32\]"):
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


def test_damaged_files_only_raise_value_errors(tmp_path):
    tensors = {name: array for name, array in qwen35_tensors(np.random.default_rng(20), 1, 2).items()}
    content = write_qwen35(tmp_path / "m.gguf", tensors, 1, 2).read_bytes()
    head = content.index(b"token_embd.weight") + 4000

    def read(path):
        path.write_bytes(path.read_bytes() + content[head:])
        for tensor in open_checkpoint(path).tensors.values():
            tensor.to_f32()

    mutations(content[:head], tmp_path / "m.gguf", read, rounds=150, seed=5)
