"""Sweeps of plans in integer arithmetic have the figures of `evaluate`, the same bytes with any number of jobs and
threads, and one program for each choice of integer layers."""

import contextlib
import json
import shutil

import pytest

from lockstep.ptq.plan import Plan
from lockstep.ptq.solved import Solved
from lockstep.runtime.threads import Team
from lockstep.study.confirm import confirm_study
from lockstep.study.kept import load_stats
from lockstep.study.recipe import Sweep
from lockstep.study.scoring.evaluate import evaluate
from lockstep.study.scoring.rig import MAX_PROGRAMS, Rig
from lockstep.study.trial_bench import Bench
from tests.study.models import recorded, window
from tests.study.test_in_integers import RULES
from tests.study.test_rig import scored
from tests.study.test_run import LENGTH, contents, run, study_of, subject_of

BASE = Plan(RULES, arithmetic="integer")
SWEEPS = (
    Sweep("product", {"norm": ("L1.norm1", ("u8", "i8/row")), "up": ("L*.up.w", ("i4/row", "mxfp4"))}),
    Sweep("product", {}, ("float", "integer")),
    Sweep("one_at_a_time", {"one_at_a_time": ("L1.[pk]*", ("u8",))}),
)
ALL_LAYERS = 9  # 4 in each of two, and the head


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(Study, its folder, the lines of its trials)."""
    folder = tmp_path_factory.mktemp("study")
    study = study_of(subject_of(), BASE, SWEEPS, num_windows=3)
    return study, folder, run(folder, study)


def solved(study, folder, trial):
    stats = load_stats(folder / "calibration.npz")
    return Solved.solve(trial.plan, study.model_name, study.content, study.sites, stats)


def test_a_trial_has_the_figures_of_its_plan_alone(made):
    study, folder, trials = made
    by_name, subject = {trial["name"]: trial for trial in trials}, subject_of()
    with contextlib.closing(Team(2)) as team:
        for name in ("base", "arithmetic float", "norm i8/row, up i4/row", "L1.k.rot u8"):
            [trial] = [trial for trial in study.trials if trial.name == name]
            alone = evaluate(subject, study.evaluation, team, solved(study, folder, trial))
            figures = alone["plan"] | alone["against float"]
            assert figures.items() <= by_name[name]["metrics"].items()
            assert list(by_name[name].get("integer", {"floats": ()})["floats"]) == list(alone.get("in floats", ()))


def test_trials_say_which_layers_are_in_floats(made):
    by_name = {trial["name"]: trial.get("integer") for trial in made[2]}
    assert by_name["base"] == by_name["norm u8, up i4/row"] == dict(layers=ALL_LAYERS, floats={})
    both = by_name["norm i8/row, up mxfp4"]
    assert both["layers"] == ALL_LAYERS - 3 and list(both["floats"]) == ["L0.gate.w", "L1.q.w", "L1.gate.w"]
    assert by_name["arithmetic float"] is None
    assert both["floats"]["L1.q.w"] == "its input, L1.norm1, is i8/row, no integer grid of a tensor"


def test_arithmetic_is_part_of_a_trials_id(made):
    floats = study_of(subject_of(), Plan(RULES), SWEEPS, num_windows=3)
    same = {trial.id for trial in floats.trials}
    assert [trial.name for trial in made[0].trials if trial.id in same] == ["base", "arithmetic float"]


@pytest.mark.parametrize("jobs, kept", [(2, 0), (1, 5)])
def test_it_writes_the_same_bytes(made, jobs, kept, tmp_path):
    study, folder, _ = made
    for name in ("ids.json", "calibration.npz"):
        shutil.copy(folder / name, tmp_path)
    lines = (folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][: 7 * kept])
    run(tmp_path, study, jobs)
    assert contents(tmp_path) == contents(folder)


def test_runs_that_begin_later_have_the_same_figures(made):
    study, folder, _ = made
    found, programs = [], []
    with contextlib.closing(Team(2)) as team:
        for room in (1 << 30, 0):
            bench = Bench(study, subject_of(), load_stats(folder / "calibration.npz"), team, room)
            found.append(list(bench.round(range(2), range(len(study.trials)))))
            programs.append(bench.rig.num_programs)
    later, whole = found
    assert [outcome.windows for outcome in later] == [outcome.windows for outcome in whole]
    assert sum(outcome.layers_saved for outcome in later) > 0 == sum(outcome.layers_saved for outcome in whole)
    # floats; all layers; all but qkv of the second; all but gate and up; all but both
    assert programs == [5, 5]


def test_a_winner_is_confirmed_in_integers(made, tmp_path):
    study, folder, trials = made
    shutil.copytree(folder, tmp_path / "copy")
    with contextlib.closing(Team(1)) as team:
        [row] = confirm_study(tmp_path / "copy", study, subject_of(), team, 1)
    [trial] = [trial for trial in trials if trial["id"] == row["id"]]
    assert row["parity"] == dict(equal=True) and row["metrics"].items() <= trial["metrics"].items()
    assert row["integer"] == dict(metrics=row["metrics"], **trial["integer"])
    assert 0 < abs(row["float"]["metrics"]["nll"] - row["metrics"]["nll"]) < 0.05 and row["disagreement"]
    assert json.loads((folder / "winner.json").read_text())["plan"]["arithmetic"] == "integer"


# ------------------------------------------------------------ the rig


def test_a_known_choice_of_layers_records_nothing(made):
    study, folder, _ = made
    model = recorded("plain")
    ids, targets = window(model, LENGTH)
    plan = lambda *rules: Plan((*RULES, *rules)).resolve(study.sites)
    setup = solved(study, folder, study.trials[0])
    with contextlib.closing(Team(1)) as team:
        rig = Rig(model, study.treatment, team, LENGTH)
        rig.set_grids(setup.grids)
        rig.set_weights(plan(), "integer")
        first, folds = scored(rig, ids, targets), rig.store.num_folds
        rig.set_weights(plan(("L0.q.w", "i4/row")), "integer")
        assert scored(rig, ids, targets).tobytes() != first.tobytes()
        assert (rig.num_programs, rig.store.num_folds) == (2, folds + 1)
        rig.set_weights({})
        rig.set_weights(plan(), "integer")
        assert scored(rig, ids, targets).tobytes() == first.tobytes()
        assert (rig.num_programs, rig.store.num_folds) == (2, folds + 1)


def test_programs_that_were_not_used_for_long_are_made_again(made, monkeypatch):
    study = made[0]
    monkeypatch.setattr("lockstep.study.scoring.rig.MAX_PROGRAMS", 1)
    assert MAX_PROGRAMS > 1
    plan = lambda *rules: Plan((*RULES, *rules)).resolve(study.sites)
    with contextlib.closing(Team(1)) as team:
        rig = Rig(recorded("plain"), study.treatment, team, LENGTH)
        for specs in (plan(), plan(("L0.q.w", "off")), plan(), plan(("L0.q.w", "i4/row"))):
            rig.set_weights(specs, "integer")
    assert rig.num_programs == 4
