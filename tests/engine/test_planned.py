"""Models under a quantization plan: every path has the bits that the study measured; and which plans are refused."""

import contextlib
import dataclasses

import numpy as np
import pytest

from lockstep.engine.cache.prefix import model_identity
from lockstep.engine.engine import Engine, EngineOptions
from lockstep.engine.planned import planned
from lockstep.engine.request import SamplingParams
from lockstep.engine.selfcheck import check as selfcheck
from lockstep.lab.parity import Path, run_parity, run_path
from lockstep.ops.rounded.attention import RoundedAttention
from lockstep.ops.sampling.score import NLL
from lockstep.ptq.plan import Plan
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import sites_for, treatment_of
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.rig import Rig
from tests.study.models import recorded, window

LENGTH, CONTENT = 70, "c" * 64
RULES = (("*", "u8"), ("*.w", "u4/row"), ("L*.p", "u8/row"), ("L*.k.all", "i8/head"), ("L*.ctx", "mxint8"))


def solved(model, plan, team, content=CONTENT):
    sites = sites_for(model.recorded, plan)
    treatment = treatment_of(plan, sites, LENGTH)
    stats = calibrate(model, treatment, team, [window(model, LENGTH, 3)[0]]) if treatment.sites else {}
    return Solved.solve(plan, "tiny", content, sites, stats)


@pytest.fixture(scope="module")
def team():
    with contextlib.closing(Team(2)) as made:
        yield made


INTEGERS = (("*", "i16"), ("*.w", "u4/row"), ("L*.norm*", "u8"), ("head", "off"))


@pytest.mark.parametrize(
    "name, fuse_scale",
    [
        ("plain", "none"),
        ("normed", "none"),
        ("hybrid", "none"),
        ("biased", "k"),
        ("normed", "k"),
        ("hybrid", "q"),
        ("windowed", "none"),
    ],
)
@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_every_path_has_the_bits_of_the_study(name, fuse_scale, arithmetic, team):
    model = recorded(name)
    rules = INTEGERS if arithmetic == "integer" else (*RULES, ("head", "off"))
    plan = Plan(rules, arithmetic=arithmetic, fuse_scale=fuse_scale)
    made = planned(model, solved(model, plan, team), CONTENT)
    ids, targets = window(model, LENGTH)
    for result in run_parity(made, ids, 1):  # one path has two threads
        assert result.identical, result.path.name
    outcome = run_path(made, ids, Path("whole", (LENGTH,), 2), num_rows=LENGTH)
    logits = outcome.logits.astype(np.float64)
    exact = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    sites = sites_for(model.recorded, plan)
    specs = plan.resolve(sites)
    rig = Rig(model, treatment_of(plan, sites, LENGTH), team, LENGTH)
    rig.set_grids(solved(model, plan, team).grids)
    rig.set_weights(specs, arithmetic)
    rig.load(ids, targets)
    rig.run()
    np.testing.assert_allclose(rig.scores()[:, NLL], exact - logits[range(LENGTH), targets], atol=2e-5)


def test_a_plan_without_rules_has_the_bits_of_the_model(team):
    model = recorded("plain")
    made = planned(model, solved(model, Plan(), team), CONTENT)
    ids = window(model, LENGTH)[0]
    path = Path("whole", (LENGTH,), 2)
    assert run_path(made, ids, path).digest == run_path(model, ids, path).digest


def test_a_plan_is_part_of_what_blocks_are_named_by(team):
    model = recorded("plain")
    identities = {model_identity(model, selfcheck.NUMERICS)}
    for rules in ((), (("*.w", "i8"),), (("*.w", "i4"),), (("L0.q", "i8"),)):
        made = planned(model, solved(model, Plan(rules), team), CONTENT)
        identities.add(model_identity(made, selfcheck.NUMERICS))
    assert len(identities) == 5


def test_its_ops_are_checked_on_this_cpu(team):
    made = planned(recorded("plain"), solved(recorded("plain"), Plan((*RULES, ("head", "off"))), team), CONTENT)
    assert any(isinstance(op, RoundedAttention) for op in made.program.ops)
    selfcheck.check(made.program, made.backend())


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_an_engine_generates_by_a_plan(arithmetic, team):
    model = recorded("plain")
    plan = Plan((*INTEGERS[:2], ("head", "off")), arithmetic=arithmetic)
    made = planned(model, solved(model, plan, team), CONTENT)
    with contextlib.closing(Engine(made, EngineOptions(max_requests=2, threads=1))) as engine:
        params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
        requests = [engine.add(window(model, n, n)[0], params) for n in (3, 40)]
        while engine.has_work:
            engine.step()
    assert all(len(request.output_ids) == 5 for request in requests)


def test_plans_that_an_engine_refuses(team):
    model = recorded("plain")
    plan = solved(model, Plan((("L0.q", "i8"),)), team)
    with pytest.raises(ValueError, match=r"a plan of another model: it is for tiny \(cccccccccccc\), this is llama"):
        planned(model, plan, "d" * 64)
    with pytest.raises(ValueError, match="plan: weights is 'q8_0', expected 'f32'"):
        planned(recorded("plain", "q8_0"), plan, CONTENT)
    additive = dataclasses.replace(plan, plan=Plan((("L0.q", "i8"),), mask="additive"))
    with pytest.raises(ValueError, match="plan: mask is 'additive', so that what a token sees depends on the later"):
        planned(model, additive, CONTENT)
