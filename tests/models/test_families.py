"""Every model type against logits that transformers computed in float32 (tests/golden/models.npz)."""

import json
import re

import numpy as np
import pytest

from lockstep.ops import BACKENDS
from tests.golden.record_models import GOLDEN, NUM_TOKENS
from tests.models import tiny
from tests.models.cases import CASES, SEED
from tests.models.running import check, load, logits_of

CUTS = (1, 2, 5, 9, 23)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(params=sorted(CASES))
def case(request, golden, tmp_path):
    """(loaded model, prompt, expected logits) of one tiny model."""
    config = CASES[request.param]
    assert json.loads(str(golden[f"{request.param}.config"])) == config, (
        "cases.py changed: run tests.golden.record_models"
    )
    folder = tiny.write(tmp_path, config, tiny.tensors(config, SEED))
    return load(folder), tiny.prompt(config, NUM_TOKENS), golden[f"{request.param}.logits"]


def test_logits_equal_those_of_transformers(case):
    model, ids, expected = case
    check(logits_of(model, ids), expected)


def test_pieces_and_used_memory_give_the_same_bits(case):
    model, ids, _ = case
    whole = logits_of(model, ids, num_threads=1)
    assert whole.tobytes() == logits_of(model, ids, CUTS, dirty=True).tobytes()


def test_a_model_says_which_ops_can_be_swapped(tmp_path):
    config = CASES["qwen3"]
    model = load(tiny.write(tmp_path, config, tiny.tensors(config, SEED)))
    swapped = model.backend({"elementwise": "reference", "add": "cpu"})
    assert swapped["rms_norm"] is BACKENDS["reference"]["rms_norm"] and swapped["add"] is BACKENDS["cpu"]["add"]
    for swaps, base, said in (
        ({}, "gpu", "backend 'gpu': there are cpu, per_token, reference"),
        ("linear=cpu", "cpu", "ops: expected a mapping from kinds or groups of ops to backends, got 'linear=cpu'"),
        ({"linear": 3}, "cpu", "ops: expected a mapping"),
        ({"linear": ["cpu"]}, "cpu", "ops: expected a mapping"),
        ({"gated_delta": "cpu"}, "cpu", "--op gated_delta=cpu: the model has no op of this kind; it has add, "),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            model.backend(swaps, base)


@pytest.mark.parametrize("backend", ["reference", "per_token"])
def test_a_swap_of_a_recurrent_op_is_one_of_its_form_that_verifies_drafts(backend, tmp_path):
    config = CASES["qwen3_5"]
    model, table = load(tiny.write(tmp_path, config, tiny.tensors(config, SEED))), BACKENDS[backend]
    swapped = model.backend({"gated_delta": backend})
    assert swapped["gated_delta"] is table["gated_delta"]
    assert swapped["gated_delta_verify"] is table["gated_delta_verify"]
    assert swapped["delta_inputs_verify"] is BACKENDS["cpu"]["delta_inputs_verify"]
    assert {kind in table for kind in ("gated_delta_verify", "gated_delta")} == {True}
    assert len({kind in table for kind in ("delta_inputs_verify", "delta_inputs")}) == 1
