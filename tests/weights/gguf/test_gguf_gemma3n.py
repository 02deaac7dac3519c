"""A GGUF file of Gemma 3n computes the same bits as the folder that it was converted from."""

import numpy as np
import pytest

from lockstep.models.checkpoint import open_checkpoint
from lockstep.models.families.gemma.gemma3n import quantile
from lockstep.models.registry import model_config
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.running import load, logits_of
from tests.weights import convert
from tests.weights.files import ARRAY, FLOAT32, gguf_bytes, plain_tensors, write
from tests.weights.gguf.gguf_models import fuse_attention
from tests.weights.gguf.test_gguf_gemma4 import STEMS as OF_GEMMA4

CONFIG = CASES["gemma3n"]
STEMS = {
    **OF_GEMMA4,
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.correct_output_scale": "altup_correct_scale",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
}
KEYS = dict(
    block_count=6, context_length=256, embedding_length=64, attention__head_count=4, attention__head_count_kv=2,
    attention__key_length=16, attention__value_length=16, attention__layer_norm_rms_epsilon=0.01,
    attention__sliding_window=9, attention__sliding_window_pattern=[True, False, True, True, False, True],
    attention__shared_kv_layers=2, rope__freq_base=500.0, rope__freq_base_swa=50.0, vocab_size=96,
    feed_forward_length=[96, 128, 96, 96, 64, 96], embedding_length_per_layer_input=16, altup__num_inputs=4,
    altup__active_idx=0, final_logit_softcapping=4.0)  # fmt: skip
DEVIATIONS = [quantile(share) if share else -np.inf for share in CONFIG["activation_sparsity_pattern"]]


def write_gemma3n(path, is_fused=False, deviations=DEVIATIONS, **changes):
    """Writes a file as conversion does: the projections of streams stacked, all other tensors as they are."""
    stored, stacks = {}, {}
    for name, array in tiny.tensors(CONFIG, 3).items():
        stem = name.removesuffix(".weight")
        if "_projections." in stem:
            stacks.setdefault(stem.split(".")[1], []).append(array)
        elif stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            stored[f"blk.{layer}.{STEMS[stem]}.weight"] = array
        else:
            stored[f"{STEMS[stem]}.weight"] = array
    stored["altup_proj.weight"] = np.stack(stacks["altup_projections"])
    stored["altup_unembd_proj.weight"] = np.stack(stacks["altup_unembed_projections"])
    if is_fused:
        fuse_attention(stored, 6)
    metadata = convert.metadata("gemma3n", **{k: v for k, v in {**KEYS, **changes}.items() if v is not None})
    metadata["gemma3n.activation_sparsity_scale"] = (ARRAY, (FLOAT32, deviations))
    return write(path, gguf_bytes(metadata, plain_tensors(stored)))


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_file_computes_the_bits_of_its_folder(is_fused, tmp_path):
    folder = load(tiny.write(tmp_path / "folder", CONFIG, tiny.tensors(CONFIG, 3)))
    file, ids = load(write_gemma3n(tmp_path / "m.gguf", is_fused)), tiny.prompt(CONFIG, 40)
    assert (file.config.input_rows, file.config.logit_cap, file.config.tied) == (80, 4, True)
    assert [layer.mixer for layer in file.config.layers] == [layer.mixer for layer in folder.config.layers]
    assert max(ids) >= 80 and logits_of(file, ids).tobytes() == logits_of(folder, ids).tobytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(feed_forward_length=[96] * 5), "feed_forward_length: expected 6 whole numbers, found 5"),
        (dict(deviations=[0.5] * 5), "'activation_sparsity_scale': expected 6 numbers"),
        (dict(altup__num_inputs=2), "'altup_num_inputs': 2 is not supported, only 4"),
        (dict(attention__sliding_window_pattern=[True]), "config key 'layer_types': expected 6 of"),
        (dict(altup__more=1), "metadata not supported: gemma3n.altup.more"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        model_config(open_checkpoint(write_gemma3n(tmp_path / "m.gguf", **changes)).config)
