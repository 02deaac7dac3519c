"""Calibration: counts are those of the tensors' numbers, in one pass, with any number of threads."""

import contextlib

import numpy as np
import pytest

from lockstep.ptq.rewrite import INSIDE, Treatment, sites_of
from lockstep.ptq.spec import Spec
from lockstep.ptq.unroll import unroll
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import COUNTED, calibrate
from lockstep.study.scoring.rig import Rig
from tests.study.models import recorded, window

LENGTH = 40


def stats_of(model, windows, threads=2, **options):
    with contextlib.closing(Team(threads)) as team:
        return calibrate(model, Treatment(inside=INSIDE, **options), team, windows)


@pytest.mark.parametrize("name", ["plain", "hybrid"])
def test_every_site_is_seen_and_threads_do_not_matter(name):
    model = recorded(name)
    windows = [window(model, LENGTH, seed)[0] for seed in range(2)]
    stats = stats_of(model, windows)
    expected = {site.name for site in sites_of(model.recorded) if not site.is_weight}
    seen = {site for site, stat in stats.items() if stat.count.all()}
    assert seen == expected
    for one in (stats_of(model, windows, 1), stats_of(model, windows[::-1], 3)):
        assert all((getattr(one[s], f) == getattr(stats[s], f)).all() for s in expected for f in COUNTED)


def test_what_is_counted_is_there():
    model = recorded("plain")
    ids, targets = window(model, LENGTH)
    stats = stats_of(model, [ids])
    H, K = model.config.layers[0].mixer.num_heads, model.config.layers[0].mixer.head_dim
    assert (stats["L0.q"].count == LENGTH * K).all() and len(stats["L0.q"].count) == H
    assert (stats["L1.p"].count == LENGTH * (LENGTH + 1) // 2).all()
    assert (stats["L1.p"].low >= 0).all() and (stats["L1.p"].high == 1).all()  # the first token sees only itself
    with contextlib.closing(Team(1)) as team:
        rig = Rig(model, Treatment(sites=(), inside=INSIDE), team, LENGTH)
        rig.load(ids, targets)
        rig.run()
        hidden = rig.hidden()
    assert (stats["norm"].low[0], stats["norm"].high[0]) == (hidden.min(), hidden.max())


def test_an_added_mask_is_seen():
    stats = stats_of(recorded("plain"), [window(recorded("plain"), LENGTH)[0]], additive=True, fill=-50.0)
    assert (stats["L0.qk.masked"].count == LENGTH * LENGTH).all() and (stats["L0.qk.masked"].low < -40).all()


@pytest.mark.parametrize("name", ["plain", "normed", "hybrid"])
def test_both_twins_give_the_same_bits_on_a_calibrated_plan(name):
    model = recorded(name)
    ids, targets = window(model, LENGTH)
    with contextlib.closing(Team(2)) as team:
        treatment = Treatment(inside=INSIDE)
        stats = calibrate(model, treatment, team, [ids])
        found = []
        for change in (None, lambda rounded: unroll(rounded.program)):
            rig = Rig(model, treatment, team, LENGTH, change)
            grids = {site: grid(stats[site]) for site in rig.rounded.grids if site in stats and stats[site].count.all()}
            rig.set_grids(grids)
            rig.load(ids, targets)
            rig.run()
            found.append(rig.scores())
        assert np.isfinite(found[0]).all() and found[0].tobytes() == found[1].tobytes()


def grid(stat):
    return stat.solve(Spec.parse("u8/head"))
