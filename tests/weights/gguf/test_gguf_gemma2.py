"""A GGUF file of Gemma 2 computes the same bits as the folder that it was converted from."""

import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.registry import model_config
from tests.models import tiny
from tests.models.cases import capped
from tests.models.running import load, logits_of
from tests.weights.gguf.test_gguf_gemma3 import write_as

CONFIG = capped(query_pre_attn_scalar=32, rope_theta=10000.0)  # as llama.cpp assumes
KEYS = dict(
    block_count=3, context_length=256, embedding_length=64, feed_forward_length=96, attention__head_count=4,
    attention__head_count_kv=2, attention__key_length=32, attention__value_length=32,
    attention__layer_norm_rms_epsilon=0.01, attention__sliding_window=9, attn_logit_softcapping=2.5,
    final_logit_softcapping=4.0)  # fmt: skip


def write_gemma2(path, arrays, **keys):
    return write_as("gemma2", path, arrays, KEYS, **keys)


@pytest.fixture(scope="module")
def arrays():
    return tiny.tensors(CONFIG, 3)


def test_a_file_computes_the_bits_of_its_folder(arrays, tmp_path):
    folder, file = (
        load(tiny.write(tmp_path / "folder", CONFIG, arrays)),
        load(write_gemma2(tmp_path / "m.gguf", arrays)),
    )
    assert file.config.layers == folder.config.layers and file.config.tied and file.config.logit_cap == 4
    ids = tiny.prompt(CONFIG, 40)
    assert logits_of(file, ids).tobytes() == logits_of(folder, ids).tobytes()


def test_what_llama_cpp_knows_by_heart(arrays, tmp_path):
    silent = dict(attn_logit_softcapping=None, final_logit_softcapping=None, attention__sliding_window=None)
    made = model_config(open_checkpoint(write_gemma2(tmp_path / "m.gguf", arrays, **silent)).config)
    assert made.logit_cap == 30 and [layer.window for layer in made.layers] == [4096, 0, 4096]
    assert {(layer.mixer.scale, layer.mixer.soft_cap) for layer in made.layers} == {(32**-0.5, 50.0)}
    none = dict(attn_logit_softcapping=0.0, final_logit_softcapping=0.0)
    made = model_config(open_checkpoint(write_gemma2(tmp_path / "m.gguf", arrays, **none)).config)
    assert made.logit_cap == 0 and made.layers[0].mixer.soft_cap == 0
