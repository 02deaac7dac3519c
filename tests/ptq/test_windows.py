"""Plans of models with windows: only layers with a window have no sites inside attention."""

import contextlib

import numpy as np
import pytest

from lockstep.ops import BACKENDS
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.ops.sampling.score import NLL
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import rounded
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import sites_for, treatment_of
from lockstep.ptq.unroll import unroll
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.rig import Rig
from tests.ops.harness import same_bits
from tests.study.models import recorded, window

LENGTH, WINDOWED, FULL = 40, (0, 1), 2  # layers


def sites_inside(sites, layer):
    return {site.name for site in sites if site.layer == layer and site.is_inner}


@pytest.mark.parametrize("mask", ["structural", "additive"])
def test_layers_with_a_window_have_no_sites_inside(mask):
    plan = Plan((("*", "i16"),), mask=mask)
    program = recorded("windowed").recorded
    sites = sites_for(program, plan)
    assert {"L2.p", "L2.qk", "L2.k.all", "L2.q.rot"} <= sites_inside(sites, FULL)
    assert not any(sites_inside(sites, layer) for layer in WINDOWED)
    assert {"L0.q", "L0.k", "L0.ctx", "L0.down.w"} <= {site.name for site in sites}
    made = rounded(program, treatment_of(plan, sites, LENGTH)).program
    assert sum(isinstance(op, RoundedAttention) for op in made.ops) == 1


def test_both_twins_and_the_definition_have_the_same_bits():
    model, plan = recorded("windowed"), Plan((("*", "i16"), ("*.w", "u4/row"), ("*norm*.w", "i8/tensor")))
    sites, found = sites_for(model.recorded, plan), []
    treatment = treatment_of(plan, sites, LENGTH)
    with contextlib.closing(Team(2)) as team:
        stats = calibrate(model, treatment, team, [window(model, LENGTH, 3)[0]])
        grids = Solved.solve(plan, "windowed", "", sites, stats).grids
        for change, table in ((None, None), (unroll, None), (None, BACKENDS["reference"])):
            rig = Rig(model, treatment, team, LENGTH, change and (lambda made: unroll(made.program)), table)
            rig.set_grids(grids)
            rig.set_weights(plan.resolve(sites))
            rig.load(*window(model, LENGTH), base=np.zeros((LENGTH, model.config.hidden_size), np.float32))
            rig.run()
            found.append(rig.scores()[:, NLL])
    assert np.isfinite(found[0]).all()
    for other in found[1:]:
        same_bits(other, found[0])
