"""The rig: without grids it has the engine's bits; runs that begin at a later layer give the same; a trial compiles and
allocates nothing."""

import contextlib

import numpy as np
import pytest

from lockstep.engine.model import load_model
from lockstep.lab.parity import Path, run_path
from lockstep.models.checkpoint import open_checkpoint
from lockstep.ops.sampling.score import BASE_NLL, KL, NLL, SAME_TOP
from lockstep.ptq.rewrite import INSIDE, Treatment
from lockstep.ptq.spec import Spec
from lockstep.runtime.threads import Team
from lockstep.study.scoring.rig import Rig
from lockstep.weights.store import WeightStore
from tests.models import tiny
from tests.ops.rounded.grid_cases import GRIDS
from tests.study.models import CONFIGS, recorded, window

LENGTH = 70


@pytest.fixture(scope="module")
def team():
    with contextlib.closing(Team(2)) as made:
        yield made


def scored(rig, ids, targets, base=None, first=0):
    rig.load(ids, targets, base)
    rig.run(first)
    return rig.scores()


def grids(rig, name):
    return {site: GRIDS[name] for site in rig.rounded.grids}


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_without_grids_it_has_the_bits_of_the_engine(name, weights, team):
    model = recorded(name, weights)
    ids, targets = window(model, LENGTH)
    logits = run_path(model, ids, Path("whole", (LENGTH,), 2), num_rows=LENGTH).logits.astype(np.float64)
    exact = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    plain = scored(Rig(model, Treatment(sites=()), team, LENGTH), ids, targets)
    np.testing.assert_allclose(plain[:, NLL], exact - logits[range(LENGTH), targets], atol=2e-5)
    observed = Rig(model, Treatment(), team, LENGTH)  # every boundary has a grid, and all are off
    assert scored(observed, ids, targets).tobytes() == plain.tobytes()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_taken_apart_is_near(name, team):
    model = recorded(name)
    ids, targets = window(model, LENGTH)
    plain = scored(Rig(model, Treatment(sites=()), team, LENGTH), ids, targets)
    apart = scored(Rig(model, Treatment(inside=INSIDE), team, LENGTH), ids, targets)
    np.testing.assert_allclose(apart[:, NLL], plain[:, NLL], atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_may_begin_at_any_layer(name, team):
    model = recorded(name)
    ids, targets = window(model, LENGTH)
    rig = Rig(model, Treatment(inside=INSIDE), team, LENGTH)
    rig.set_grids(grids(rig, "mxint8"))
    whole = scored(rig, ids, targets)
    assert whole.tobytes() != scored(Rig(model, Treatment(inside=INSIDE), team, LENGTH), ids, targets).tobytes()
    states = []
    for start in rig.layer_starts:
        rig.run(0, start)
        states.append(rig.state(start))
    other = window(model, LENGTH, 1)
    for start, state in zip(rig.layer_starts, states, strict=True):
        scored(rig, *other)  # other rows, keys and states everywhere
        rig.load(ids, targets)
        rig.restore(start, state)
        rig.run(start)
        assert rig.scores().tobytes() == whole.tobytes()


def test_prefixes_tell_what_a_later_run_may_use(team):
    rig = Rig(recorded("plain"), Treatment(inside=INSIDE), team, LENGTH)
    plain = rig.prefixes()
    rig.set_grids({"L1.p": GRIDS["i8"]})
    assert rig.prefixes() == plain  # both layers begin before
    rig.set_grids({"L0.p": GRIDS["i8"]})
    assert [a == b for a, b in zip(rig.prefixes(), plain, strict=True)] == [True, False]
    rig.set_grids({})
    rig.set_weights({"L0.down.w": Spec.parse("i8")})
    assert [a == b for a, b in zip(rig.prefixes(), plain, strict=True)] == [True, False]
    rig.set_weights({"embed.w": Spec.parse("i8")})
    assert [a == b for a, b in zip(rig.prefixes(), plain, strict=True)] == [False, False]
    rig.set_weights({})
    assert rig.prefixes() == plain


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_can_be_rounded_and_put_back(name, team):
    model = recorded(name)
    ids, targets = window(model, LENGTH)
    rig = Rig(model, Treatment(), team, LENGTH)
    base = scored(rig, ids, targets)
    hidden = rig.hidden()
    seen = {base.tobytes()}
    for site in rig.rounded.weights:
        rig.set_weights({site: Spec.parse("i4")})
        found = scored(rig, ids, targets, hidden)
        assert found.tobytes() not in seen, site
        seen.add(found.tobytes())
        assert (found[:, BASE_NLL] == base[:, NLL]).all() and found[:, KL].max() > 0
    rig.set_weights({})
    again = scored(rig, ids, targets, hidden)
    assert (again[:, NLL] == base[:, NLL]).all() and not again[:, KL].any() and again[:, SAME_TOP].all()


def test_a_table_of_bf16_is_rounded_in_place_and_put_back(tmp_path, team):
    config = CONFIGS["plain"]
    path = tiny.write(tmp_path, config, tiny.tensors(config, 5), "BF16")
    model = load_model(open_checkpoint(path), WeightStore(), "f32", "f32", 256)
    ids, targets = window(model, LENGTH)
    rig = Rig(model, Treatment(), team, LENGTH)
    plain = scored(rig, ids, targets)
    rig.set_weights({"embed.w": Spec.parse("i8")})
    assert scored(rig, ids, targets).tobytes() != plain.tobytes()
    rig.set_weights({})
    assert scored(rig, ids, targets).tobytes() == plain.tobytes() and rig.num_programs == 1


def test_a_trial_packs_only_what_is_new(team):
    model = recorded("plain")
    rig = Rig(model, Treatment(), team, LENGTH)
    rig.set_weights({"L0.q.w": Spec.parse("i4")})
    assert rig.store.num_folds == 1
    rig.set_weights({"L0.q.w": Spec.parse("i4"), "L1.down.w": Spec.parse("u8")})
    rig.set_weights({"L0.q.w": Spec.parse("i4")})
    assert rig.store.num_folds == 2


def test_rounded_weights_need_float32(team):
    rig = Rig(recorded("plain", "bf16"), Treatment(sites=()), team, LENGTH)
    with pytest.raises(ValueError, match="the layer multiplies bf16, and rounded weights are float32"):
        rig.set_weights({"L0.q.w": Spec.parse("i4")})


def test_logits_can_be_rounded(team):
    model = recorded("plain")
    ids, targets = window(model, LENGTH)
    rig = Rig(model, Treatment(), team, LENGTH)
    plain = scored(rig, ids, targets)
    rig.set_grids({"head": GRIDS["u3"]})
    assert scored(rig, ids, targets).tobytes() != plain.tobytes()


def test_without_a_base_there_is_the_same_nll(team):
    model = recorded("plain")
    ids, targets = window(model, LENGTH)
    both = [
        scored(Rig(model, Treatment(), team, LENGTH, compares=compares), ids, targets) for compares in (True, False)
    ]
    assert (both[0][:, NLL] == both[1][:, NLL]).all() and not both[1][:, KL].any()
