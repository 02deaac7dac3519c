"""A GGUF file of gpt-oss computes the same bits as the folder that it was converted from."""

import numpy as np
import pytest

from lockstep.formats import MXFP4
from lockstep.formats.mxfp4 import from_pairs
from lockstep.models.checkpoint import open_checkpoint
from tests.models import tiny
from tests.models.running import load, logits_of
from tests.models.test_gpt_oss import BLOCKS, with_blocks
from tests.weights import convert
from tests.weights.files import gguf_bytes, write, write_folder

EXPERTS, WIDTH = 8, 64
METADATA = convert.metadata(
    "gpt-oss", block_count=3, context_length=256, embedding_length=64, feed_forward_length=WIDTH,
    attention__head_count=4, attention__head_count_kv=2, attention__key_length=32, attention__value_length=32,
    attention__layer_norm_rms_epsilon=0.01, rope__freq_base=500.0, rope__scaling__type="yarn",
    rope__scaling__factor=4.0, rope__scaling__original_context_length=64, rope__scaling__yarn_beta_fast=8.0,
    attention__sliding_window=9, expert_count=EXPERTS, expert_used_count=3,
    expert_feed_forward_length=WIDTH)  # fmt: skip
STEMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    **{f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"},
    "self_attn.o_proj": "attn_output",
    "mlp.router": "ffn_gate_inp",
}


def split(array, axis):
    """Gate and up of a matrix or of biases in which they alternate."""
    return [np.ascontiguousarray(array.take(range(first, array.shape[axis], 2), axis)) for first in (0, 1)]


def plain(array):
    return "f32", array.shape, array.tobytes()


def experts_of(at, rest, arrays, blocks):
    """The tensors that a tensor of the experts becomes."""
    matrix, _, suffix = rest.removeprefix("mlp.experts.").partition("_proj")
    names = ("gate", "up") if matrix == "gate_up" else ("down",)
    name = f"{at[1]}{rest}"
    if suffix:
        parts = split(arrays[name], 1) if len(names) == 2 else [arrays[name]]
        return {f"{at[0]}ffn_{n}_exps.bias": plain(part) for n, part in zip(names, parts, strict=True)}
    if not blocks:
        rows = arrays[name].swapaxes(1, 2)
        parts = split(rows, 1) if len(names) == 2 else [np.ascontiguousarray(rows)]
        return {f"{at[0]}ffn_{n}_exps.weight": plain(part) for n, part in zip(names, parts, strict=True)}
    pairs = [blocks[f"{name}_{kind}"] for kind in ("blocks", "scales")]
    E, N, num = pairs[1].shape
    rows = from_pairs(pairs[0].reshape(E * N, num, 16), pairs[1].reshape(E * N, num)).reshape(E, N, -1)
    parts = split(rows, 1) if len(names) == 2 else [rows]
    shape = (E, N // len(names), 32 * num)
    return {f"{at[0]}ffn_{n}_exps.weight": ("mxfp4", shape, p.tobytes()) for n, p in zip(names, parts, strict=True)}


def file_of(path, arrays, blocks=None, **changed):
    """Writes a file as conversion does. blocks: the experts' blocks and scales, for experts as MXFP4."""
    stored = {}
    for name, array in arrays.items():
        if name in convert.WHOLE:
            stored[convert.WHOLE[name]] = plain(array)
            continue
        prefix, rest = name[: name.index(".", 13) + 1], name[name.index(".", 13) + 1 :]
        at = f"blk.{prefix.split('.')[2]}."
        if rest.startswith("mlp.experts."):
            stored |= experts_of((at, prefix), rest, arrays, blocks)
        elif rest == "self_attn.sinks":
            stored[f"{at}attn_sinks.weight"] = plain(array)
        else:
            stem, _, suffix = rest.rpartition(".")
            stored[f"{at}{STEMS[stem]}.{suffix}"] = plain(array)
    return write(path, gguf_bytes({**METADATA, **changed}, stored))


OLLAMA = convert.metadata(
    "gptoss",
    **{key.removeprefix("gpt-oss.").replace(".", "__"): value for key, (_, value) in METADATA.items()
       if key.startswith("gpt-oss.") and not key.endswith((".type", "expert_feed_forward_length", "beta_fast"))},
)  # fmt: skip
OLLAMA_ROPE = {key: value for key, value in BLOCKS["rope_scaling"].items() if key != "beta_fast"}
OLLAMA_STEMS = {**STEMS, "self_attn.o_proj": "attn_out", "post_attention_layernorm": "ffn_norm"}
EXPERT_STEMS = {"gate_up_proj": "ffn_gate_up_exps", "down_proj": "ffn_down_exps"}


def ollama_file(path, arrays, kind, fused=False):
    """Writes a file as Ollama's own conversion does, from a folder's tensors with blocks. kind: of the experts: 4, in
    which bytes are as in the folder, or GGML's own. fused: queries, keys and values are one tensor."""
    stored = {}
    for name, array in arrays.items():
        if name in convert.WHOLE:
            stored[convert.WHOLE[name]] = plain(array)
            continue
        _, _, layer, rest = name.split(".", 3)
        stem, _, suffix = rest.rpartition(".")
        matrix, _, part = suffix.rpartition("_")
        if stem != "mlp.experts":
            named = "attn_sinks" if suffix == "sinks" else f"{OLLAMA_STEMS[stem]}.{suffix}"
            stored[f"blk.{layer}.{named}"] = plain(array)
        elif part == "bias":
            stored[f"blk.{layer}.{EXPERT_STEMS[matrix]}.bias"] = plain(array)
        elif part == "blocks":
            scales = arrays[name.replace("_blocks", "_scales")]
            E, N, num, _ = array.shape
            raw = np.concatenate([scales[..., None], array], axis=-1)
            if kind == "mxfp4":
                raw = from_pairs(array.reshape(E * N, num, 16), scales.reshape(E * N, num))
            stored[f"blk.{layer}.{EXPERT_STEMS[matrix]}.weight"] = (kind, (E, N, num * 32), raw.tobytes())
    for layer in range(3 if fused else 0):
        for suffix in ("weight", "bias"):
            parts = [stored.pop(f"blk.{layer}.attn_{p}.{suffix}") for p in "qkv"]
            shape = (sum(part[1][0] for part in parts), *parts[0][1][1:])
            stored[f"blk.{layer}.attn_qkv.{suffix}"] = ("f32", shape, b"".join(part[2] for part in parts))
    return write(path, gguf_bytes(OLLAMA, stored))


@pytest.mark.parametrize("kind, fused", [("pairs", False), ("pairs", True), ("mxfp4", False)])
def test_a_file_of_ollama_is_its_folder(kind, fused, made, tmp_path):
    file = ollama_file(tmp_path / "m.gguf", made[0], kind, fused)
    folder = write_folder(tmp_path / "m", made[0], **{**BLOCKS, "rope_scaling": OLLAMA_ROPE})
    models, ids = [load(path, "auto") for path in (file, folder)], tiny.prompt(BLOCKS, 40)
    assert models[0].config.layers == models[1].config.layers
    assert logits_of(models[0], ids).tobytes() == logits_of(models[1], ids).tobytes()


@pytest.fixture(scope="module")
def made():
    """(blocks, numbers): tensors by Hugging Face name."""
    return with_blocks(5)


def test_a_file_computes_the_bits_of_its_folder(made, tmp_path):
    file, folder = file_of(tmp_path / "m.gguf", made[1]), write_folder(tmp_path / "m", made[1], **BLOCKS)
    models, ids = [load(path) for path in (file, folder)], tiny.prompt(BLOCKS, 40)
    assert models[0].config.layers == models[1].config.layers and not models[0].config.tied
    assert logits_of(models[0], ids).tobytes() == logits_of(models[1], ids).tobytes()


def test_blocks_are_those_of_the_folder(made, tmp_path):
    file, folder = file_of(tmp_path / "m.gguf", made[1], made[0]), write_folder(tmp_path / "m", made[0], **BLOCKS)
    models, ids = [load(path, "auto") for path in (file, folder)], tiny.prompt(BLOCKS, 40)
    assert all(MXFP4.name in {weight.format for weight in model.recorded.weights()} for model in models)
    assert logits_of(models[0], ids).tobytes() == logits_of(models[1], ids).tobytes()


def test_a_lying_number_of_experts_is_refused(made, tmp_path):
    for number in (0, 7, 10**9):
        path = file_of(tmp_path / f"{number}.gguf", made[1], **convert.metadata("gpt-oss", expert_count=number))
        with pytest.raises(ValueError, match=f"ffn_.*_exps.weight.*expected a stack of {number} experts' matrices"):
            open_checkpoint(path)
