"""GGUF files that llama.cpp wrote, run by both engines. Opt-in: needs models and an interpreter with llama-cpp-python.

    PEERS_DIR=...          its folder `models` holds NAME-hf and NAME-FORM.gguf, converted from the same bf16 weights
    LLAMA_CPP_PYTHON=...   an interpreter that can import llama_cpp

The exact logits are those of the file's weights in float32, by Lockstep, whose float32 path is compared with
transformers in test_transformers.py. Both engines multiply activations of 8 or 16 bits, which gives each an error; the
test prints both errors.
"""

import functools
import os
import pathlib
import subprocess

import numpy as np
import pytest

from tests.models.running import load, logits_of

MODELS = pathlib.Path(os.environ.get("PEERS_DIR", "")) / "models"
LLAMA_CPP = os.environ.get("LLAMA_CPP_PYTHON")
pytestmark = pytest.mark.skipif(not os.environ.get("PEERS_DIR"), reason="PEERS_DIR does not name a folder with models")
NAMES = ("qwen3-0.6b", "qwen3.5-0.8b")
FORMS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
IDS = np.random.RandomState(3).randint(0, 100_000, 48).tolist()
WORST_RATIO = 1.25  # of our rms error to llama.cpp's


@functools.lru_cache(maxsize=4)
def ours(path, weights):
    """Lockstep's logits [tokens, V]."""
    if not path.exists():
        pytest.skip(f"{path.name} has not been made")
    return logits_of(load(path, weights), IDS)


def theirs(path, folder):
    """llama.cpp's logits [tokens, V]."""
    if not LLAMA_CPP:
        pytest.skip("LLAMA_CPP_PYTHON does not name an interpreter with llama-cpp-python")
    script, out = pathlib.Path(__file__).with_name("llama_cpp_logits.py"), folder / "logits.npy"
    subprocess.run([LLAMA_CPP, script, path, out, *map(str, IDS)], check=True, stdout=subprocess.DEVNULL)
    return np.load(out)


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def agreement(found, exact):
    """(rms error relative to the rms of the exact logits, number of positions whose argmax agrees)."""
    same = (found.argmax(-1) == exact.argmax(-1)).mean()
    return f"rms error {rms(found - exact) / rms(exact):.2e}, argmax {same:.0%}"


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_file_is_its_folder_bit_for_bit(name):
    folder, file = ours(MODELS / f"{name}-hf", "auto"), ours(MODELS / f"{name}-BF16.gguf", "auto")
    assert np.isfinite(folder).all() and folder.tobytes() == file.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_as_near_to_exact_as_llama_cpp(name, form, tmp_path, capsys):
    path = MODELS / f"{name}-{form}.gguf"
    found, exact, other = ours(path, "auto"), ours(path, "f32"), theirs(path, tmp_path)
    original = ours(MODELS / f"{name}-BF16.gguf", "f32")
    with capsys.disabled():
        print(
            f"\n{path.name}: Lockstep {agreement(found, exact)}; llama.cpp {agreement(other, exact)}; "
            f"the file against bf16 weights: Lockstep {agreement(found, original)}, "
            f"llama.cpp {agreement(other, original)}"
        )
    assert np.isfinite(found).all() and rms(found - exact) <= WORST_RATIO * rms(other - exact)
