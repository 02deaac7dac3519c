import contextlib

from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import sites_of
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import treatment_of
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.disagreement import disagreement
from tests.study.models import recorded, window


def found(*rules):
    model = recorded("plain")
    plan, sites = Plan(rules), sites_of(model.recorded)
    windows, treatment = [window(model, 60, seed)[0] for seed in range(2)], treatment_of(plan, sites, 60)
    with contextlib.closing(Team(2)) as team:
        stats = calibrate(model, treatment, team, windows)
        grids = Solved.solve(plan, "plain", "", sites, stats).grids
        return model, disagreement(model, treatment, team, windows, grids, plan.resolve(sites))


def test_sixteen_bits_differ_in_some_codes_and_eight_in_hardly_any():
    model, wide = found(("*", "i16"), ("*.w", "i8/row"), ("head", "off"))
    assert set(wide) == {f"L{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o", "gate", "up", "down")}
    heads = model.config.layers[0].mixer
    assert wide["L0.q"].num_all == 2 * 60 * heads.num_heads * heads.head_dim
    assert 0 < sum(one.num_different for one in wide.values()) < 0.02 * sum(one.num_all for one in wide.values())
    narrow = found(("*", "u8"), ("*.w", "i4/row"), ("head", "off"))[1]
    assert sum(one.num_different for one in narrow.values()) < sum(one.num_different for one in wide.values())


def test_layers_in_float_arithmetic_are_left_out():
    assert not found(("*", "i16"), ("*.w", "mxfp4"), ("head", "off"))[1]
