"""Tables that stay in the checkpoint's file: they are mapped, not copied, and a step reads the rows that it needs."""

import os

import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.elementwise.embed import MAPPED, RAW
from lockstep.runtime.program import Weight
from lockstep.weights import content, packed_file, store
from lockstep.weights.store import PackedStore
from tests.kernels import shared_kernels
from tests.models import tiny
from tests.models.cases import PER_LAYER

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
NAME = "model.embed_tokens_per_layer.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user cache folder without packed weights."""
    folder = shared_kernels(tmp_path / "cache")
    monkeypatch.setenv("LOCKSTEP_CACHE", str(folder))
    monkeypatch.setattr(content, "SETTLED_NS", 0)
    return folder


@pytest.fixture
def arrays():
    return tiny.tensors(PER_LAYER, 3)


@pytest.fixture
def folder(arrays, tmp_path):
    return tiny.write(tmp_path / "model", PER_LAYER, arrays)


def table_of(folder, progress=None):
    """(store, weight) of the table."""
    checkpoint = open_checkpoint(folder)
    part = checkpoint.tensors[NAME]
    return PackedStore(checkpoint, progress), Weight(NAME, part.format, part.shape, (part,))


def is_in_file(array):
    """Whether an array lies in a map of a file."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            first, end = (int(address, 16) for address in line.split()[0].split("-"))
            if first <= array.ctypes.data < end:
                return line.rstrip().endswith(".safetensors")
    return False


def packed_bytes(cache):
    return sum(path.stat().st_size for path in (cache / "packed").rglob("*.packed"))


@pytest.mark.parametrize("layout, num_bytes", [(MAPPED, 0), (RAW, packed_file.PAGE)], ids=["unchecked", "checked"])
def test_a_table_is_mapped_and_not_kept_anywhere(layout, num_bytes, folder, arrays, cache):
    """Of one that was checked a note is kept."""
    store, weight = table_of(folder)
    (found,) = store.arrays(weight, layout)
    assert found.shape == (96, 4 * 96) and not found.flags.writeable and is_in_file(found)
    assert found.tobytes() == arrays[NAME].tobytes() and packed_bytes(cache) == num_bytes
    os.truncate(folder / "model.safetensors", 100)
    assert found.tobytes() == arrays[NAME].tobytes()  # a copy took the map's place before the file was cut
    assert not is_in_file(found)


@pytest.mark.parametrize("layout", [MAPPED, RAW], ids=["unchecked", "checked"])
def test_a_file_that_is_open_for_writing_is_copied(layout, folder, arrays, cache):
    store, weight = table_of(folder)
    with open(folder / "model.safetensors", "r+b"):
        (found,) = store.arrays(weight, layout)
    assert found.tobytes() == arrays[NAME].tobytes() and packed_bytes(cache) > found.nbytes


@pytest.mark.parametrize("layout", [MAPPED, RAW], ids=["unchecked", "checked"])
def test_a_file_that_changed_since_it_was_opened_is_not_mapped(layout, folder):
    store, weight = table_of(folder)
    (folder / "model.safetensors").touch()
    (found,) = store.arrays(weight, layout)
    assert not is_in_file(found)


def test_a_table_is_checked_once(folder, cache, monkeypatch):
    """And what is checked counts as packed, what was checked before as loaded."""
    reports = []
    for work in ("packing", "loading"):
        made, weight = table_of(folder, lambda *report: reports.append(report))
        made.expect([(weight, RAW)])
        made.arrays(weight, RAW)
        assert reports.pop() == (work, weight.parts[0].data.nbytes, weight.parts[0].data.nbytes)
        made.checkpoint.content.wait()
        monkeypatch.setattr(store, "check_matrix", lambda part: pytest.fail("checked again"))


def test_a_mapped_table_with_a_nan_is_refused(arrays, tmp_path, cache):
    arrays[NAME][9, 5] = np.nan
    made, weight = table_of(tiny.write(tmp_path / "broken", PER_LAYER, arrays))
    with pytest.raises(ValueError, match=r"'model.embed_tokens_per_layer.weight': expected finite weights.*\[9, 5\]"):
        made.arrays(weight, RAW)
    assert packed_bytes(cache) == 0


def test_a_model_answers_from_a_mapped_table(folder, cache):
    """As from a copy in memory; and a row that is not finite is an error of the requests that use it, only."""
    llm = LLM(folder, weights="f32", max_context=256, threads=1)
    first = llm.generate([[5, 6, 7]], GREEDY)[0].token_ids
    llm.close()
    arrays = tiny.tensors(PER_LAYER, 3)
    arrays[NAME][9] = np.nan
    broken = tiny.write(folder.parent / "broken", PER_LAYER, arrays)
    llm = LLM(broken, weights="f32", max_context=256, threads=1)
    assert llm.generate([[5, 6, 7]], GREEDY)[0].token_ids == first or 9 in first
    assert llm.generate([[5, 9, 7]], GREEDY)[0].error == "the model's logits are not finite"
    llm.close()
