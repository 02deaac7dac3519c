"""A GGUF file of Qwen3.5-MoE, with its MTP head, gives back the checkpoint it was converted from."""

import ml_dtypes
import numpy as np
import pytest

from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.model import load_model
from lockstep.engine.request import SamplingParams
from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.recording import record
from lockstep.models.registry import model_config
from lockstep.weights.store import WeightStore
from tests.models import tiny
from tests.models.cases import hybrid_experts
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import gguf_bytes, plain_tensors, write
from tests.weights.fuzz import mutations
from tests.weights.gguf.gguf_models import assert_same_qwen35, stored

CONFIG = hybrid_experts(mtp_num_hidden_layers=1, linear_key_head_dim=32)  # llama.cpp wants heads of one size
METADATA = dict(
    vocab_size=96, block_count=5, nextn_predict_layers=1,
    context_length=256, embedding_length=64, attention__head_count=4,
    attention__head_count_kv=2, attention__key_length=32, attention__value_length=32, rope__dimension_count=16,
    rope__freq_base=500.0, rope__dimension_sections=[11, 11, 10, 0], attention__layer_norm_rms_epsilon=0.01,
    ssm__conv_kernel=4, ssm__state_size=32, ssm__group_count=2, ssm__time_step_rank=4, ssm__inner_size=128,
    full_attention_interval=4, expert_count=16, expert_used_count=3, expert_feed_forward_length=32,
    expert_shared_feed_forward_length=48)  # fmt: skip


def checkpoint_tensors(seed=3):
    """Tensors of a checkpoint in bf16, whose norms come back from 1 + w exactly enough."""
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in tiny.tensors(CONFIG, seed).items()}


def write_qwen35moe(path, tensors, fused=False, rename=("", ""), others=None, **values):
    """rename: a part of GGUF's names, and what takes its place. others: more tensors."""
    named = convert.stacked_experts(tensors, 4, fused)
    for name, array in tensors.items():
        if ".experts." not in name:
            array = convert.convert_qwen35(name, array, 2, 4, 128)
            array = array[0] if "shared_expert_gate" in name else array
            named[convert.gguf_name(name, 4, "post_attention_norm")] = stored(name, array)
    named = {name.replace(*rename): array for name, array in named.items()} | (others or {})
    metadata = convert.metadata("qwen35moe", **METADATA | values) | convert.NO_VOCABULARY
    return write(path, gguf_bytes(metadata, plain_tensors(named)))


def test_qwen35moe(tmp_path):
    expected = checkpoint_tensors()
    checkpoint = open_checkpoint(write_qwen35moe(tmp_path / "m.gguf", expected))
    assert_same_qwen35(checkpoint, expected)
    assert model_config(checkpoint.config).layers == model_config(CONFIG).layers
    assert model_config(checkpoint.config).mtp_layers == model_config(CONFIG).mtp_layers


@pytest.mark.parametrize("fused", [False, True], ids=["two tensors", "one tensor"])
def test_a_gguf_file_computes_what_its_checkpoint_does(fused, tmp_path):
    tensors, ids = checkpoint_tensors(), tiny.prompt(CONFIG, 20)
    folder = tiny.write(tmp_path / "hf", CONFIG, tensors, "BF16")
    path = write_qwen35moe(tmp_path / "m.gguf", tensors, fused)
    found, expected = (logits_of(load(p), ids) for p in (path, folder))
    assert np.abs(found - expected).max() < 1e-5  # A_log and w come back rounded


@pytest.mark.parametrize("fused", [False, True], ids=["two tensors", "one tensor"])
def test_the_head_of_a_file_drafts(fused, tmp_path):
    path = write_qwen35moe(tmp_path / "m.gguf", checkpoint_tensors(), fused)
    made = load_model(open_checkpoint(path), WeightStore(), "f32", "bf16", 256)
    answers = []
    for options in (dict(speculate="off"), dict(speculate="mtp", draft=3)):
        engine = Engine(made, EngineOptions(threads=1, max_requests=1, **options))
        answers.append(engine.add([3, 4, 5] * 20, SamplingParams(max_tokens=40, ignore_eos=True)))
        while engine.has_work:
            engine.step()
        engine.close()
    assert answers[0].output_ids == answers[1].output_ids and answers[1].num_drafted > 30


OLLAMA = dict(
    block_count=4, nextn_predict_layers=0, attention__head_count_kv=[0, 0, 0, 2], feed_forward_length=0,
    rope__dimension_sections=[11, 11, 10], rope__mrope_section=[11, 11, 10], mrope_sections=[11, 11, 10],
    rope__mrope_interleaved=True, ssm__v_head_reordered=True, norm_top_k_prob=True, image_token_id=7,
    vision_start_token_id=8, vision_end_token_id=9, vision__block_count=1, vision__image_mean=[1, 1, 1])  # fmt: skip


def test_a_file_of_ollama(tmp_path):
    """It has vision, a draft head under its Hugging Face names, kv heads layer by layer, and keys of its own."""
    tensors, ids = checkpoint_tensors(), tiny.prompt(CONFIG, 20)
    text = {name: array for name, array in tensors.items() if not name.startswith("mtp.")}
    others = {f"{name}.weight": np.ones(4, np.float32) for name in ("v.blk.0.norm1", "mm.0", "mtp.fc")}
    path = write_qwen35moe(tmp_path / "m.gguf", text, rename=("ssm_dt.bias", "ssm_dt"), others=others, **OLLAMA)
    config = model_config(open_checkpoint(path).config)
    assert config.layers == model_config(CONFIG).layers and not config.mtp_layers
    folder = tiny.write(tmp_path / "hf", CONFIG, tensors, "BF16")
    found, expected = (logits_of(load(p), ids) for p in (path, folder))
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(
    "values, message",
    [
        ({"expert_count": 15}, "expected a stack of 15 experts' matrices"),
        ({"expert_shared_count": 2}, "expert_shared_count is not 1"),
        ({"attention__head_count_kv": [0, 0, 2, 4, 2]}, "attention.head_count_kv differs between layers"),
        ({"ssm__v_head_reordered": False}, "ssm.v_head_reordered is False, which is not supported"),
        ({"ssm__v_head_reordered": 1}, "ssm.v_head_reordered must be true or false, found 1"),
        ({"expert_weights_scale": 2.5}, "metadata not supported: qwen35moe.expert_weights_scale"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit_is_named(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write_qwen35moe(tmp_path / "m.gguf", checkpoint_tensors(), **values))


def test_a_fused_stack_of_another_number_is_named(tmp_path):
    path = write_qwen35moe(tmp_path / "m.gguf", checkpoint_tensors(), True, expert_count=15)
    with pytest.raises(ValueError, match=r"ffn_down_exps\.weight.*: expected a stack of 15 experts' matrices"):
        open_checkpoint(path)


def test_a_gate_of_several_rows_is_named(tmp_path):
    others = {"blk.0.ffn_gate_inp_shexp.weight": np.zeros((2, 64), np.float32)}
    path = write_qwen35moe(tmp_path / "m.gguf", checkpoint_tensors(), others=others)
    with pytest.raises(ValueError, match=r"'blk\.0\.ffn_gate_inp_shexp\.weight' \[2, 64\]: expected one row"):
        open_checkpoint(path)


def test_damaged_files_only_raise_value_errors(tmp_path):
    content = write_qwen35moe(tmp_path / "m.gguf", checkpoint_tensors(), True).read_bytes()
    head = content.index(b"token_embd.weight") + 9000

    def read(path):
        path.write_bytes(path.read_bytes() + content[head:])
        opened = open_checkpoint(path)
        record(model_config(opened.config), opened.tensors)

    mutations(content[:head], tmp_path / "m.gguf", read, rounds=60, seed=5)
