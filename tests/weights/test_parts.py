"""Experts that are packed when a step first reads them: the same bits, fewer experts, and the same files in the end."""

import os
import threading

import numpy as np
import pytest

from lockstep.engine.model import load_model
from lockstep.models.checkpoint import open_checkpoint
from lockstep.weights import store as weight_store
from lockstep.weights.store import PackedStore
from tests.models import running, tiny
from tests.models.cases import CASES
from tests.models.running import load

# matrices one by one; stacks, one of whose matrices is read transposed; a stack of gate and up
MODELS = [("qwen3_moe", "q8_0"), ("gpt_oss", "bf16"), ("gemma4_experts", "f32")]
QWEN = CASES["qwen3_moe"]
PROMPT = tiny.prompt(QWEN, 2)


@pytest.fixture(autouse=True)
def packed(tmp_path, monkeypatch):
    """A fresh folder of packed weights, while kernels stay where they are."""
    monkeypatch.setattr(weight_store, "_packed_folder", lambda: tmp_path / "packed")
    (tmp_path / "packed").mkdir(mode=0o700)
    return tmp_path / "packed"


def checkpoint_of(tmp_path, name="qwen3_moe", change=lambda tensors: None):
    """A model's folder, which is made if it is not there."""
    folder, config = tmp_path / name, CASES[name]
    if not folder.exists():
        tensors = tiny.tensors(config, 1)
        change(tensors)
        tiny.write(folder, config, tensors)
    return open_checkpoint(folder)


def loaded(checkpoint, weights="q8_0", packs_lazily=True, progress=None):
    store = PackedStore(checkpoint, progress, packs_lazily)
    checkpoint.content.wait(timeout=60)
    return load_model(checkpoint, store, weights, None, 256)


def logits_of(model, ids, cuts=()):
    return running.logits_of(model, ids, cuts, num_threads=1)


def num_packed(store):
    return {key[0]: parts.num_packed for key, parts in store.in_parts.items()}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.packed")}


@pytest.mark.parametrize("name, weights", MODELS)
def test_bits_and_files_are_those_of_packing_all_before(name, weights, tmp_path, packed):
    lazy, prompt = loaded(checkpoint_of(tmp_path, name), weights), tiny.prompt(CASES[name], 9)
    expected = logits_of(load(tmp_path / name, weights), prompt)
    assert logits_of(lazy, prompt, (2, 3)).tobytes() == expected.tobytes()
    assert 0 < min(num_packed(lazy.store).values())
    assert not lazy.store.is_finished
    lazy.store.finish()
    made = files(packed)
    assert lazy.store.is_finished and logits_of(lazy, prompt).tobytes() == expected.tobytes()
    for path in packed.rglob("*.packed"):
        os.unlink(path)
    again = loaded(open_checkpoint(tmp_path / name), weights, packs_lazily=False)
    assert logits_of(again, prompt).tobytes() == expected.tobytes() and files(packed) == made


def test_only_what_steps_read_is_packed_and_progress_says_how_much(tmp_path):
    told = []
    lazy = loaded(checkpoint_of(tmp_path), progress=lambda *report: told.append(report))
    logits_of(lazy, PROMPT)
    most = QWEN["num_experts_per_tok"] * len(PROMPT)
    packed = num_packed(lazy.store)
    assert len(packed) == 2 * QWEN["num_hidden_layers"] and all(3 <= count <= most for count in packed.values())
    before = told[-1][1]
    lazy.store.finish()
    of_all = sum(tensor.nbytes for name, tensor in tiny.tensors(QWEN, 1).items() if ".experts." in name)
    of_packed = sum(4 * 32 * 64 * count * (2 if "gate_up" in name else 1) for name, count in packed.items())
    assert {kind for kind, *_ in told} == {"packing"} and told[-1][1] - before == of_all - of_packed


def test_a_process_that_ends_in_between_has_kept_whole_weights_and_the_next_packs_the_rest(tmp_path, packed):
    lazy, asked = loaded(checkpoint_of(tmp_path)), []
    expected = logits_of(lazy, PROMPT)
    lazy.store.finish(lambda: asked.append(None) or len(asked) > 3.5 * QWEN["num_experts"])
    kept = files(packed)
    experts = 2 * QWEN["num_hidden_layers"]
    others = len(kept) - 3
    told = []
    again = loaded(open_checkpoint(tmp_path / "qwen3_moe"), progress=lambda *report: told.append(report))
    assert logits_of(again, PROMPT).tobytes() == expected.tobytes()
    assert len(again.store.in_parts) == experts - 3 and {kind for kind, *_ in told} - {"reading"} == {
        "loading",
        "packing",
    }
    again.store.finish()
    assert len(files(packed)) == experts + others and files(packed).items() >= kept.items()
    told.clear()
    assert logits_of(loaded(open_checkpoint(tmp_path / "qwen3_moe")), PROMPT).tobytes() == expected.tobytes()


def test_two_that_pack_the_same_model_at_once(tmp_path, packed):
    checkpoint_of(tmp_path)
    both = [loaded(open_checkpoint(tmp_path / "qwen3_moe")) for _ in range(2)]
    expected = [logits_of(each, PROMPT).tobytes() for each in both]
    threads = [threading.Thread(target=each.store.finish) for each in both]
    for thread in threads:
        thread.start()
    assert [logits_of(each, PROMPT).tobytes() for each in both] == expected, "while they pack"
    for thread in threads:
        thread.join()
    assert expected[0] == expected[1] and all(each.store.is_finished for each in both)
    assert loaded(open_checkpoint(tmp_path / "qwen3_moe")).store.is_finished
    assert not list(packed.rglob(".making*"))


def test_a_file_that_changed_is_not_read_any_more(tmp_path):
    lazy = loaded(checkpoint_of(tmp_path))
    logits_of(lazy, PROMPT)
    os.utime(tmp_path / "qwen3_moe" / "model.safetensors", (1, 1))
    with pytest.raises(ValueError, match="the file changed while the model was being loaded"):
        logits_of(lazy, tiny.prompt(QWEN, 40))


def test_weights_that_are_not_finite_are_named_when_they_are_packed(tmp_path):
    name = "model.layers.1.mlp.experts.7.up_proj.weight"

    def break_one(tensors):
        tensors[name][3, 5] = np.nan

    lazy = loaded(checkpoint_of(tmp_path, change=break_one))
    with pytest.raises(ValueError, match=rf"tensor '{name}': expected finite weights, .* at index \[3, 5\]"):
        logits_of(lazy, PROMPT)  # if it reads this expert
        lazy.store.finish()


def test_what_finds_no_room_is_packed_by_need_only(tmp_path, packed, monkeypatch, caplog):
    monkeypatch.setenv("LOCKSTEP_CACHE_GB", "0")
    lazy = loaded(checkpoint_of(tmp_path))
    expected = logits_of(lazy, PROMPT)
    before = num_packed(lazy.store)
    lazy.store.finish()
    assert num_packed(lazy.store) == before and lazy.store.num_bytes_not_kept and not files(packed)
    assert logits_of(lazy, PROMPT).tobytes() == expected.tobytes() and lazy.store.is_finished
    assert "cannot be kept" in caplog.text
