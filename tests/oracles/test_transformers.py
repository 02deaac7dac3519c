"""Live comparison with transformers, with fresh seeds: every family, bf16 checkpoints, and the bundled model.

Run by `make test-oracles`; the seed of a failure is in its message, LOCKSTEP_SEED repeats it.
"""
import os
import pathlib
import secrets

import numpy as np
import pytest

import lockstep
from tests.models import tiny
from tests.models.cases import CASES
from tests.models.running import check, difference, load, logits_of

hugging_face = pytest.importorskip("tests.oracles.hugging_face", reason="torch and transformers are needed", exc_type=ImportError)

SEED = int(os.environ.get("LOCKSTEP_SEED") or secrets.randbelow(1 << 30))
BUNDLED = pathlib.Path(lockstep.__file__).parent / "bundled"
NUM_TOKENS = 70  # more than one page of keys


def made(folder, name, dtype="F32"):
    """(folder, prompt) of a tiny model with the session's seed."""
    config = CASES[name]
    return tiny.write(folder, config, tiny.tensors(config, SEED), dtype), tiny.prompt(config, NUM_TOKENS, SEED)


@pytest.mark.parametrize("name", CASES)
def test_float32(name, tmp_path):
    folder, ids = made(tmp_path, name)
    expected, model = hugging_face.logits(folder, ids), load(folder)
    whole = logits_of(model, ids)
    worst, flips = difference(whole, expected)
    assert worst <= 1e-4 and flips == 0, f"seed {SEED}: max_abs_diff {worst:.3g}, {flips} argmax differ"
    assert whole.tobytes() == logits_of(model, ids, cuts=(1, 2, 33, 64, 65)).tobytes(), f"seed {SEED}"


@pytest.mark.parametrize("name", CASES)
def test_bf16_checkpoint_as_stored(name, tmp_path):
    """bf16 weights and cache: as near to the exact result as transformers' own bf16 is."""
    folder, ids = made(tmp_path, name, "BF16")
    exact, theirs = hugging_face.logits(folder, ids), hugging_face.logits(folder, ids, hugging_face.torch.bfloat16)
    ours = logits_of(load(folder, "auto"), ids)
    error, allowed = np.sqrt(np.mean((ours - exact) ** 2)), np.sqrt(np.mean((theirs - exact) ** 2))
    assert error <= 1.2 * allowed + 1e-3, f"seed {SEED}: rms error {error:.3g}, transformers' own {allowed:.3g}"


@pytest.mark.parametrize("weights, worst_allowed", [("f32", 1e-4), ("auto", 0.1)])
def test_bundled_model(weights, worst_allowed):
    ids = [1, *np.random.RandomState(SEED).randint(0, 4096, NUM_TOKENS - 1).tolist()]
    expected = hugging_face.logits(BUNDLED, ids)
    found = logits_of(load(BUNDLED, weights), ids)
    if weights == "f32":
        check(found, expected, worst_allowed)
    assert difference(found, expected)[0] <= worst_allowed
