"""A GGUF file of Qwen3-Next computes what the checkpoint does that it was converted from."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from tests.models import tiny
from tests.models.cases import next_hybrid
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write
from tests.weights.gguf.gguf_models import stored
from tests.weights.gguf.test_gguf_qwen35moe import METADATA

CONFIG = next_hybrid(mlp_only_layers=[], linear_key_head_dim=32)
SIZES = {k: v for k, v in METADATA.items() if k not in ("nextn_predict_layers", "rope__dimension_sections")}


def converted(name, array, fused):
    """[(GGUF's name, array), ...] of a tensor outside of the experts. fused: in_proj_qkvz stays as it is."""
    if name.endswith("A_log"):
        array = -np.exp(array.astype(np.float32))
    elif "conv1d" in name or "shared_expert_gate" in name:
        array = array.reshape(-1, array.shape[-1])
        array = array[0] if len(array) == 1 else array
    elif "norm" in name.split(".")[-2] and "linear_attn" not in name:
        array = array.astype(np.float32) + np.float32(1)
    gguf = convert.gguf_name(name, 4, "post_attention_norm")
    if "in_proj_qkvz" not in name or fused:
        return [(gguf, array)]
    heads = np.split(array, 2)  # of each key head 32 rows of queries, 32 of keys, 64 of values, 64 of their gates
    q, k, v, z = (np.concatenate([head[a:b] for head in heads]) for a, b in ((0, 32), (32, 64), (64, 128), (128, 192)))
    return [(gguf.replace("ssm_in", "attn_qkv"), np.concatenate([q, k, v])), (gguf.replace("ssm_in", "attn_gate"), z)]


def write_qwen3next(path, tensors, fused=False, **values):
    named = convert.stacked_experts(tensors, 4, False)
    for name in (name for name in tensors if ".experts." not in name):
        named |= {gguf: stored(name, array) for gguf, array in converted(name, tensors[name], fused)}
    sizes = SIZES | dict(block_count=4, feed_forward_length=80)
    metadata = convert.metadata("qwen3next", **sizes | values) | convert.NO_VOCABULARY
    return write(path, gguf_bytes(metadata, plain_tensors(named)))


@pytest.mark.parametrize("fused", [False, True], ids=["newer file", "older file"])
def test_qwen3next(fused, tmp_path):
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in tiny.tensors(CONFIG, 3).items()}
    path = write_qwen3next(tmp_path / "m.gguf", tensors, fused)
    checkpoint, ids = open_checkpoint(path), tiny.prompt(CONFIG, 20)
    assert model_config(checkpoint.config).layers == model_config(CONFIG).layers
    folder = tiny.write(tmp_path / "hf", CONFIG, tensors, "BF16")
    found, expected = (logits_of(load(p), ids) for p in (path, folder))
    assert np.abs(found - expected).max() < 1e-5  # A_log and w come back rounded


def test_experts_that_are_not_there_are_missed(tmp_path):
    tensors = tiny.tensors(CONFIG, 3)
    path = write_qwen3next(tmp_path / "m.gguf", {n: a for n, a in tensors.items() if ".experts." not in n})
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.0\.mlp\.experts\.0\.gate_proj.* is missing"):
        load(path)
