"""NVFP4 in GGUF files: weights of a tensor, or of each expert, times the factor that lies beside it."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.formats import NVFP4
from lockstep.models.checkpoint import open_checkpoint
from tests.models import tiny
from tests.weights import convert
from tests.weights.files import gguf_bytes, write
from tests.weights.gguf.test_gguf_experts import CONFIG, METADATA, NUM_EXPERTS, random_blocks

FLOATS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
QUERIES, EXPERTS = "blk.0.attn_q", "blk.0.ffn_down_exps"


def written(folder, **factors):
    """A file whose queries and down projections of experts are NVFP4, with these tensors {name: array} beside them."""
    rng, arrays, tensors = np.random.default_rng(3), tiny.tensors(CONFIG, 5), {}
    for name in [n for n in arrays if ".experts." not in n]:
        tensors[convert.gguf_name(name, 1, "ffn_norm")] = arrays[name]
    for part in ("gate", "up", "down"):
        names = [f"model.layers.0.mlp.experts.{e}.{part}_proj.weight" for e in range(NUM_EXPERTS)]
        tensors[f"blk.0.ffn_{part}_exps.weight"] = np.stack([arrays[name] for name in names])
    shapes = {name: tensors[f"{name}.weight"].shape for name in (QUERIES, EXPERTS)}
    blocks = {name: random_blocks("nvfp4", shape, rng) for name, shape in shapes.items()}
    for raw in blocks.values():
        raw.reshape(-1, NVFP4.block_bytes)[:, :4] = rng.integers(1, 127, (raw.size // NVFP4.block_bytes, 4))
    stored = {name: ("f32", a.shape, a.astype(np.float32).tobytes()) for name, a in (tensors | factors).items()}
    stored |= {f"{name}.weight": ("nvfp4", shapes[name], raw.tobytes()) for name, raw in blocks.items()}
    return write(folder / "m.gguf", gguf_bytes(METADATA, stored)), blocks


def weights(rows, factor):
    """float32 [rows, K]: number * (scale * factor), read by the layout's description."""
    blocks = rows.reshape(len(rows), -1, NVFP4.block_bytes)
    scales = blocks[..., :4].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(factor)
    bytes_of = blocks[..., 4:].reshape(*blocks.shape[:2], 4, 8)
    numbers = FLOATS[np.concatenate([bytes_of & 15, bytes_of >> 4], axis=-1)]
    return (numbers * scales[..., None]).reshape(len(rows), -1) + np.float32(0)


def test_factors_of_tensors_and_of_experts(tmp_path):
    each = np.random.default_rng(1).uniform(1e-5, 1e-4, NUM_EXPERTS).astype(np.float32)
    whole, activations = np.array([3.1e-5], np.float32), np.ones(1, np.float32)
    beside = {f"{QUERIES}.scale": whole, f"{QUERIES}.input_scale": activations, f"{EXPERTS}.scale": each}
    path, blocks = written(tmp_path, **beside)
    tensors = open_checkpoint(path).tensors
    queries = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert queries.format == tensors.info[queries.name].format == "nvfp4_scaled"
    assert queries.to_f32().tobytes() == weights(blocks[QUERIES], whole[0]).tobytes()
    for e in (0, 3, NUM_EXPERTS - 1):
        expert = tensors[f"model.layers.0.mlp.experts.{e}.down_proj.weight"]
        assert expert.to_f32(slice(2, 9)).tobytes() == weights(blocks[EXPERTS][e][2:9], each[e]).tobytes()


def test_without_factors_weights_are_those_of_the_blocks(tmp_path):
    path, blocks = written(tmp_path)
    queries = open_checkpoint(path).tensors["model.layers.0.self_attn.q_proj.weight"]
    assert queries.format == "nvfp4" and queries.to_f32().tobytes() == weights(blocks[QUERIES], 1).tobytes()


@pytest.mark.parametrize("factors", [np.ones(3, np.float32), np.full(1, np.nan, np.float32)], ids=["number", "nan"])
def test_factors_that_are_wrong_are_named(factors, tmp_path):
    path, _ = written(tmp_path, **{f"{EXPERTS}.scale": factors})
    tensors = open_checkpoint(path).tensors
    with pytest.raises(ValueError, match=r"blk.0.ffn_down_exps.scale'.*(expected one factor|NaN or infinite)"):
        tensors["model.layers.0.mlp.experts.5.down_proj.weight"].to_f32()


def test_a_factor_of_another_format_is_refused(tmp_path):
    path, _ = written(tmp_path, **{"blk.0.attn_k.scale": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"blk.0.attn_k.scale.* is not one that architecture"):
        open_checkpoint(path)
