"""Plans in integer arithmetic: `evaluate` on both twins, and the figures beside each confirmed plan."""

import contextlib

from lockstep.ptq.plan import Plan
from lockstep.ptq.solved import Solved
from lockstep.ptq.treatment import sites_for
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.evaluate import TWINS, Setup, evaluate
from lockstep.study.scoring.in_integers import InIntegers
from lockstep.study.scoring.subject import treatment_for
from tests.study.test_run import study_of, subject_of

RULES = (("*", "i16"), ("*.w", "u8/row"), ("*norm*.w", "off"))


def solved(subject, windows, team, *rules, arithmetic="integer"):
    plan = Plan((*RULES, *rules), arithmetic=arithmetic)
    sites = sites_for(subject.model.recorded, plan)
    specs = plan.resolve(sites)
    treatment = treatment_for(subject.model.recorded, plan, [specs], max(len(w.ids) for w in windows))
    stats = calibrate(subject.model, treatment, team, [w.ids for w in windows])
    return Solved.solve(plan, subject.name, subject.content, sites, stats)


def test_both_twins_multiply_integers_with_the_same_bits():
    subject = subject_of()
    windows = study_of(subject, num_windows=2).evaluation
    with contextlib.closing(Team(2)) as team:
        made = solved(subject, windows, team, ("L1.down.w", "mxfp8"))
        one, two = (evaluate(subject, windows, team, made, twin) for twin in TWINS)
        floats = evaluate(subject, windows, team, solved(subject, windows, team, arithmetic="float"))
    assert one == two and list(one["in floats"]) == ["L1.down.w"]
    assert "in floats" not in floats
    assert 0 < abs(one["plan"]["nll"] - floats["plan"]["nll"]) < 0.05


def test_a_confirmed_plan_says_what_integers_make_of_it():
    subject = subject_of()
    study = study_of(subject, num_windows=2)
    with contextlib.closing(Team(1)) as team:
        made = solved(subject, study.evaluation, team)
        setup = Setup(made.plan.resolve(study.sites), made.grids)
        in_integers = InIntegers(study, subject, team)
        record = in_integers.record(setup, {})
        assert in_integers.record(Setup({}, {}), {}) == {}
    assert "float" not in record
    assert record["integer"]["layers"] > 0 and record["integer"]["metrics"]["nll"] > 0
    assert all(0 <= different <= total for different, total in record["disagreement"].values())
