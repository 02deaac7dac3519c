"""The bundled model's logits are the ones that were recorded, in every weight format, on every machine."""

import json

import pytest

from lockstep.engine.selfcheck.check import NUMERICS
from tests.golden.record_digests import FORMATS, GOLDEN, logits_digest, weights_digest

RECORDED = json.loads(GOLDEN.read_text())


def test_the_digests_belong_to_these_weights_and_this_numerics():
    assert RECORDED["weights"] == weights_digest(), (
        "the bundled weights changed: run python -m tests.golden.record_digests"
    )
    assert RECORDED["numerics"] == NUMERICS, "NUMERICS changed: run python -m tests.golden.record_digests"


@pytest.mark.parametrize(("kv_dtype", "recorded"), [(None, "logits"), ("q8", "logits, q8 cache")])
@pytest.mark.parametrize("weights", FORMATS)
def test_logits_are_the_recorded_ones(weights, kv_dtype, recorded):
    assert logits_digest(weights, kv_dtype) == RECORDED[recorded][weights], (
        "The bits of the logits changed. That is a decision, not a repair: if an op's definition was changed on "
        "purpose, raise NUMERICS in lockstep/engine/selfcheck/check.py, record both golden files again, and commit "
        "only that. Otherwise a kernel or the order of its arithmetic is wrong: `lockstep parity --first-difference` "
        "names the op."
    )
