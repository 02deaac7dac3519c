"""Names of TICO's observers, and sites without one; tests/oracles/test_tico_plan.py compares with TICO itself."""

import json

import numpy as np
import pytest

from lockstep.ptq.plan import Plan
from lockstep.ptq.solved import Solved
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import fold
from lockstep.study.tico import qparams
from tests.study.models import recorded


def solved(*rules, mask="additive", **options):
    """A solved plan without grids: weights and errors need none."""
    return Solved(Plan(rules, mask=mask, **options), "", "", {})


def test_weights_have_the_scales_of_their_rows():
    model = recorded("plain")
    made = json.loads(json.dumps(qparams(solved(["L*.k.w", "u4/row"], ["L1.norm2.w", "i16"]), model)))
    matrices = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)]
    assert sorted(made) == sorted([*matrices, "model.layers.1.post_attention_layernorm.weight"])
    for name in matrices:
        expected = fold(model.checkpoint.tensors[name].finite_f32(), Spec.parse("u4/row"))
        np.testing.assert_array_equal(np.float32(made[name]["scale"]), expected.scale.ravel(), name)
        np.testing.assert_array_equal(made[name]["zero_point"], expected.zero.ravel(), name)
    assert isinstance(made["model.layers.1.post_attention_layernorm.weight"]["scale"], float)


@pytest.mark.parametrize(
    "model, plan, words",
    [
        ("normed", solved(), "type 'llama', and this one is 'qwen3'"),
        ("plain", solved(mask="structural"), "mask is 'structural', expected 'additive'"),
        ("plain", solved(["L1.res.attn", "i16"]), "site L1.res.attn: TICO rounds nothing there"),
        ("plain", solved(["L0.q", "u8/head"]), "site L0.q: u8/head:minmax is no grid of TICO's"),
        ("plain", solved(["L0.q", "mxfp4"]), "site L0.q: mxfp4 is no grid of TICO's"),
        ("plain", solved(["L0.q.w", "i4/32"]), "site L0.q.w: i4/32:minmax is no grid of TICO's"),
    ],
)
def test_what_tico_does_not_have_is_named(model, plan, words):
    with pytest.raises(ValueError, match=words):
        qparams(plan, recorded(model))
