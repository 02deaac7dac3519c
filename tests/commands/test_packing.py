"""What the answers of `generate` and `chat` have not needed is packed after them, and found by the next start."""

import os

import pytest

from lockstep import LLM, SamplingParams
from lockstep.commands.terminal.packing import finish_packing, packing_beside
from lockstep.weights import store as weight_store
from tests.models import tiny
from tests.models.cases import CASES

CONFIG = CASES["qwen3_moe"]
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model of which nothing is packed."""
    monkeypatch.setattr(weight_store, "_packed_folder", lambda: tmp_path / "packed")
    (tmp_path / "packed").mkdir(mode=0o700)
    return tiny.write(tmp_path / "m", CONFIG, tiny.tensors(CONFIG, 1))


def load(folder, **options):
    llm = LLM(str(folder), packs_lazily=True, progress=False, threads=1, max_requests=1, **options)
    llm.content.wait(timeout=60)  # until then packed weights may move to another folder at any time
    return llm


def answer(llm):
    return llm.generate([tiny.prompt(CONFIG, 2)], PARAMS, progress=False)[0].token_ids


def test_after_an_answer(folder):
    first = load(folder)
    expected = answer(first)
    assert not first.is_all_packed
    finish_packing(first)
    first.close()
    second = load(folder)
    assert second.is_all_packed and answer(second) == expected
    second.close()


def test_beside_a_conversation(folder):
    llm = load(folder)
    with packing_beside(llm) as begin:
        expected = answer(llm)
        begin()
        assert answer(llm) == expected
    with packing_beside(llm) as begin:
        begin()
        while not llm.is_all_packed:
            answer(llm)
    assert answer(llm) == expected
    llm.close()


def test_a_file_that_changed_is_told_and_the_conversation_goes_on(folder, capsys):
    llm, told = load(folder), ""
    expected = answer(llm)
    os.utime(folder / "model.safetensors", (1, 1))
    with packing_beside(llm) as begin:
        begin()
        while not told:
            told = capsys.readouterr().err
    assert "the file changed while the model was being loaded" in told and not llm.is_all_packed
    assert answer(llm) == expected, "whose experts were packed before"
    llm.close()
