"""GGUF files against logits that llama.cpp computed in float32 (tests/golden): Qwen's by b9190 in cyllama 0.2.18, the
others by llama-cpp-python 0.3.36."""

import numpy as np
import pytest

from lockstep.weights.gguf.file import open_file
from tests.golden.record_llama_cpp import FILES, GOLDEN, IDS
from tests.models.running import check, load, logits_of


@pytest.mark.parametrize("name", FILES)
def test_logits_equal_those_of_llama_cpp(name, tmp_path):
    golden, path = np.load(GOLDEN), FILES[name](tmp_path / "m.gguf")
    assert open_file(path).header_hash == str(golden[f"{name}.header"]), (
        "another file is written: run tests.golden.record_llama_cpp"
    )
    check(logits_of(load(path), IDS), golden[f"{name}.logits"])
