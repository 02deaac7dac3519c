"""Layers in integer arithmetic: which layers qualify, the reasons of the others, and how near their results are."""

import contextlib

import numpy as np
import pytest

from lockstep.ops.integer.code_linear import CodeLinear
from lockstep.ops.linear.linear import Linear
from lockstep.ops.sampling.score import NLL
from lockstep.ptq.integer import integers
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import rounded, sites_of
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import treatment_of
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.rig import Rig
from tests.study.models import recorded, window

LENGTH = 60
ALL = (("*", "i16"), ("*.w", "i8/row"), ("head", "off"))


def made(*rules, name="plain"):
    """(the program with integer layers, {layer in float arithmetic: reason})."""
    model = recorded(name)
    sites, plan = sites_of(model.recorded), Plan((*ALL, *rules))
    found = integers(rounded(model.recorded, treatment_of(plan, sites, LENGTH)), plan.resolve(sites))
    return found.program, found.floats


@pytest.mark.parametrize("name", ["plain", "normed", "hybrid"])
def test_every_layer_can_be_one(name):
    program, floats = made(name=name)
    assert not floats and not any(isinstance(op, Linear) for op in program.ops)
    count = sum(isinstance(op, Linear) for op in recorded(name).recorded.ops)
    assert sum(isinstance(op, CodeLinear) for op in program.ops) == count


REASONS = [
    (("L0.norm1", "i8/row"), "L0.q.w", "its input, L0.norm1, is i8/row, no integer grid of a tensor"),
    (("L1.norm2", "off"), "L1.gate.w", "its input, model.layers.1.post_attention_layernorm, has no grid"),
    (("L1.norm2", "mxint8"), "L1.gate.w", "its input, L1.norm2, is mxint8, no integer grid of a tensor"),
    (("L0.ctx", "i8/head"), "L0.o.w", "its input, L0.ctx, is i8/head:minmax, no integer grid of a tensor"),
    (("L0.down.w", "i16"), "L0.down.w", "L0.down.w is i16/row:minmax, no integers of at most 8 bits"),
    (("L0.k.w", "i4/32"), "L0.q.w", "L0.k.w is i4/32:minmax, integers in groups of columns"),
    (("head.w", "mxfp4"), "head.w", "head.w is mxfp4, no integers of at most 8 bits"),
]


@pytest.mark.parametrize("rule, site, reason", REASONS)
def test_what_stays_float_is_named(rule, site, reason):
    assert made(rule)[1] == {site: reason}


@pytest.mark.parametrize("name", ["plain", "normed", "hybrid"])
def test_integers_are_near_floats(name):
    model = recorded(name)
    sites, plan = sites_of(model.recorded), Plan(ALL)
    (ids, targets), specs, treatment = window(model, LENGTH), plan.resolve(sites), treatment_of(plan, sites, LENGTH)
    with contextlib.closing(Team(2)) as team:
        stats = calibrate(model, treatment, team, [ids])
        grids = Solved.solve(plan, name, "", sites, stats).grids
        found = []
        rig = Rig(model, treatment, team, LENGTH)
        rig.set_grids(grids)
        for arithmetic in ("float", "integer"):
            rig.set_weights(specs, arithmetic)
            rig.load(ids, targets)
            rig.run()
            found.append(rig.scores()[:, NLL])
    assert (found[0] != found[1]).any()
    np.testing.assert_allclose(found[0], found[1], atol=2e-2)
