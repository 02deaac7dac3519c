"""Random checkpoints as Hugging Face tensors and converted to GGUF, and the comparison of both."""

import ml_dtypes
import numpy as np

from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write

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
    """The array as GGUF stores it: vectors become float32, matrices keep their format."""
    return array.astype(np.float32) if array.ndim == 1 or name.endswith(("conv1d.weight", "A_log")) else array


def write_dense(path, tensors, architecture, extra=None, change=lambda name, array: array, fused=False, **values):
    named = {}
    for name, array in tensors.items():
        gguf = convert.gguf_name(name, 2, "ffn_norm")
        named[gguf] = stored(name, change(name, array))
    if fused:
        fuse_attention(named, 2)
    metadata = convert.metadata(architecture, **{**LLAMA, **values})
    return write(path, gguf_bytes(metadata, {**plain_tensors(named), **(extra or {})}))


def fuse_attention(stored, num_layers):
    """Queries, keys and values, where there are any, become one tensor of each layer, and their biases another."""
    for layer in range(num_layers):
        for suffix in ("weight", "bias"):
            names = [f"blk.{layer}.attn_{part}.{suffix}" for part in "qkv"]
            if names[1] in stored:
                parts = [stored.pop(name) for name in names if name in stored]
                stored[f"blk.{layer}.attn_qkv.{suffix}"] = np.concatenate(parts)


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
    """assert_same, except for norms: w comes back rounded, so that 1 + w is the same."""
    assert set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        tensor, info = checkpoint.tensors[name], checkpoint.tensors.info[name]
        assert tensor.shape == info.shape == array.shape and tensor.format == info.format, name
        found, wanted = tensor.to_f32(), array.astype(np.float32)
        is_norm = name.endswith("norm.weight") or "_norm_" in name
        one = np.float32(1 if is_norm and "linear_attn" not in name else 0)
        assert (found + one == wanted + one).all(), name
        assert not tensor.data.flags.writeable
