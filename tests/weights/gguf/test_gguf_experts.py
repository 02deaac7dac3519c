"""Experts in GGUF files, stacked in one tensor [experts, rows, columns], against one tensor per expert."""

import ml_dtypes
import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.formats import BLOCK_FORMATS, FORMATS, Q8_0
from lockstep.formats.pack import pack
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.linear.experts import ExpertLinear
from tests.kernels import shared_kernels
from tests.models import tiny
from tests.models.cases import case
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import gguf_bytes, write

NUM_EXPERTS, LAYERS, WIDTH = 16, 1, 256
CONFIG = case(
    "qwen3_moe",
    head_dim=32,
    num_attention_heads=8,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=2,
    moe_intermediate_size=WIDTH,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
)
METADATA = convert.metadata(
    "qwen3moe", block_count=LAYERS, context_length=256, embedding_length=WIDTH, feed_forward_length=96,
    attention__head_count=8, attention__head_count_kv=2, attention__key_length=32, attention__value_length=32,
    attention__layer_norm_rms_epsilon=1e-6, rope__dimension_count=32, rope__freq_base=500.0, vocab_size=96,
    expert_count=NUM_EXPERTS, expert_used_count=2, expert_feed_forward_length=WIDTH)  # fmt: skip
PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


IN_FILES = [name for name, format in FORMATS.items() if format.gguf_type is not None]


def encode(format, weights, rng):
    """A stack in a format: (bytes, its weights as float32). Formats that cannot be quantized to get random blocks."""
    if format in PLAIN:
        stored = weights.astype(PLAIN[format])
        return stored.tobytes(), stored.astype(np.float32)
    block = BLOCK_FORMATS[format]
    packed = block.quantize(weights) if block.stored.encode else random_blocks(format, weights.shape, rng)
    return packed.tobytes(), block.dequantize(packed)


def random_blocks(format, shape, rng):
    block = BLOCK_FORMATS[format]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block.block_size, block.block_bytes), np.uint8)
    size = 1e-4 if block.block_size == 256 else 4e-3
    block.put_scales(blocks, rng.uniform(size, 2 * size, blocks.shape[:-1]))
    return blocks.reshape(*shape[:-1], -1)


def fused_and_not(folder, formats, attention="f32"):
    """Paths of a GGUF file with stacked experts (gate, up and down in these formats) and of the equal Hugging Face
    folder.

    attention: the format of the matrices outside of the experts.
    """
    rng, arrays, fused = np.random.default_rng(4), tiny.tensors(CONFIG, 5), {}
    for layer in range(LAYERS):
        for part, format in zip(("gate", "up", "down"), formats, strict=True):
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(NUM_EXPERTS)]
            raw, means = encode(format, np.stack([arrays[n] for n in names]), rng)
            fused[f"blk.{layer}.ffn_{part}_exps.weight"] = (format, means.shape, raw)
            arrays.update(zip(names, means, strict=True))
    for name in [n for n in arrays if ".experts." not in n]:
        format = attention if arrays[name].ndim == 2 else "f32"
        raw, arrays[name] = encode(format, arrays[name], rng)
        fused[convert.gguf_name(name, LAYERS, "ffn_norm")] = (format, arrays[name].shape, raw)
    path = write(folder / "m.gguf", gguf_bytes(METADATA, fused))
    return path, tiny.write(folder / "hf", CONFIG, arrays)


def expert_weights(program):
    return [op.weight for op in program.ops if isinstance(op, ExpertLinear)]


@pytest.mark.parametrize("formats", [("f32",) * 3, ("f16",) * 3, ("bf16",) * 3, ("q8_0",) * 3, ("q4_0",) * 3,
                                     ("q4_k", "q4_k", "q6_k"), ("q6_k", "q4_k", "q8_0"), ("q4_0", "f16", "q6_k"),
                                     ("q5_k", "q5_k", "q5_1"), ("q5_0", "q5_0", "q4_1")],
                         ids="-".join)  # fmt: skip
def test_fused_experts_are_the_experts_one_by_one(formats, tmp_path):
    fused, unfused = fused_and_not(tmp_path, formats)
    found, expected = open_checkpoint(fused).tensors, open_checkpoint(unfused).tensors
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].shape == expected[name].shape
        assert (found[name].to_f32() == expected[name].to_f32()).all(), name
    ids = tiny.prompt(CONFIG, 40)
    logits = [logits_of(load(path), ids) for path in (fused, unfused)]
    assert np.isfinite(logits[0]).all() and (logits[0] == logits[1]).all()


def test_the_usual_q4_k_m_experts_are_multiplied_as_they_are_stored(tmp_path):
    fused, unfused = fused_and_not(tmp_path, ("q4_k", "q4_k", "q6_k"))
    auto, q8 = (expert_weights(load(path, weights).recorded) for path, weights in ((fused, "auto"), (unfused, "q8_0")))
    assert [w.format for w in auto] == ["q4_k", "q6_k"] * LAYERS and {w.format for w in q8} == {"q8_0"}


def test_gate_and_up_of_two_formats_are_one_product_in_q8_0(tmp_path):
    fused, unfused = fused_and_not(tmp_path, ("q6_k", "q4_k", "q4_0"))
    auto, q8 = (expert_weights(load(path, weights).recorded) for path, weights in ((fused, "auto"), (unfused, "q8_0")))
    assert [w.format for w in auto] == ["q8_0", "q4_0"] * LAYERS
    assert all((a == b).all() for a, b in zip(pack(Q8_0, auto[0]), pack(Q8_0, q8[0]), strict=True))


def test_experts_of_the_formats_that_kernels_take_stay_as_they_are(tmp_path):
    for format in IN_FILES:
        fused, _ = fused_and_not(tmp_path, (format,) * 3)
        assert {w.format for w in expert_weights(load(fused, "auto").recorded)} == {format}
        assert np.isfinite(logits_of(load(fused, "auto"), tiny.prompt(CONFIG, 9))).all()


@pytest.mark.parametrize("attention", [f for f in IN_FILES if FORMATS[f].is_quantized and not FORMATS[f].stored.encode])
def test_a_file_of_one_format_is_loaded_and_answers_as_its_definitions_do(attention, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(shared_kernels(tmp_path / "cache")))
    path, _ = fused_and_not(tmp_path, ("q4_k", "q4_k", "q6_k"), attention)
    answers = []
    for ops in (None, None, {"linear": "reference"}):  # weights packed now, packed before; then the definition
        llm = LLM(str(path), ops=ops, max_requests=1, threads=1)
        assert {w.format for w in llm.model.recorded.weights()} >= {attention, "q4_k", "q6_k", "f32"}
        answers += llm.generate([tiny.prompt(CONFIG, 20)], SamplingParams(max_tokens=5, ignore_eos=True))
        llm.close()
    assert answers[0].logprobs == answers[1].logprobs == answers[2].logprobs
    assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
