"""Studies give the same bytes with any number of jobs and threads, and after interruptions."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lockstep.ptq.observers import Stat
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import rounded
from lockstep.ptq.solved import Solved
from lockstep.ptq.weights import fold
from lockstep.runtime.threads import Team
from lockstep.study import records
from lockstep.study.recipe import Sweep
from lockstep.study.records import Lines, held, line_of
from lockstep.study.report.data import report_data
from lockstep.study.report.report import write_report
from lockstep.study.rounds import check_follows
from lockstep.study.run import RunOptions, ranking, run_study
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.rig import Rig
from lockstep.study.scoring.subject import load_subject
from lockstep.study.scoring.text import Window
from lockstep.study.trial_bench import Bench
from lockstep.study.trials import make_study
from lockstep.study.workers import Workers
from tests.study.models import folder, window

LENGTH, BASE = 40, Plan([["*", "i16"], ["*.w", "i8"]])
SWEEPS = (
    Sweep("product", {"k": ("L*.k.all", ("u4", "u8/head")), "p": ("L*.p", ("u2", "u8"))}),
    Sweep("one_at_a_time", {"one_at_a_time": ("L1.[qkp]*", ("u8",))}),
)
FILES = ("trials.jsonl", "rounds.jsonl")


def subject_of(name="plain"):
    return load_subject(str(folder(name)), LENGTH, "f32", "f32")


def study_of(subject, plan=BASE, sweeps=SWEEPS, num_windows=5, num_calibration=2, **options):
    windows = [Window(*map(tuple, window(subject.model, LENGTH, seed))) for seed in range(num_windows)]
    calibration = [window(subject.model, LENGTH, 100 + seed)[0] for seed in range(num_calibration)]
    return make_study(subject, plan, sweeps, calibration, windows, **{"round": 2, **options})


def run(folder, study, jobs=1, threads=1, **options):
    with contextlib.closing(Team(threads)) as team:
        return run_study(folder, study, subject_of(), team, RunOptions(jobs, threads, **options))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(Study, its folder, the lines of its trials), run in one piece by one process."""
    folder = tmp_path_factory.mktemp("study")
    study = study_of(subject_of())
    return study, folder, run(folder, study)


def test_trials_say_what_was_tried(made):
    study, folder, trials = made
    assert [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()] == trials
    assert {trial["id"] for trial in trials} == {trial.id for trial in study.trials}
    by_name = {trial["name"]: trial for trial in trials}
    base, alone = by_name["base"], by_name["L1.q.rot u8"]
    assert len(base["window_nll"]) == base["windows"] == base["forwards"] == 5
    assert (base["layers_run"], base["layers_saved"]) == (10, 0) and (alone["layers_run"], alone["layers_saved"]) == (
        5,
        5,
    )
    assert alone["swept"] == dict(site="L1.q.rot", spec="u8") and alone["plan"]["apart"] == list(study.treatment.inside)
    assert by_name["k u8/head, p u2"]["swept"] == dict(k="u8/head", p="u2")
    assert len(by_name["k u8/head, p u2"]["sites"]["L0.k.all"]["scale"]) == 2
    assert by_name["k u4, p u8"]["metrics"]["kv_bytes"] < base["metrics"]["kv_bytes"]
    assert base["sites"]["L0.q.w"]["spec"] == "i8/row:minmax"


def test_trials_say_how_far_weights_are_from_what_they_were(made):
    study, _, trials = made
    specs = {name: spec for name, spec in study.trials[0].plan.resolve(study.sites).items() if name.endswith(".w")}
    found, parts = trials[0]["sites"], rounded(subject_of().model.recorded, study.treatment).weights
    assert len(specs) > 10 and all(found[name]["sqnr"][0] > 20 for name in specs)
    for name in ("L0.q.w", "L1.down.w", "embed.w"):
        [part] = [part.weight.parts[part.index] for part in parts[name]]
        x = part.to_f32().astype(np.float64)
        apart = x - fold(part.to_f32(), specs[name]).values
        assert found[name]["sqnr"] == [pytest.approx(10 * np.log10((x * x).sum() / (apart * apart).sum()), abs=1e-4)]
    assert all(trial["sites"]["L0.q.w"] == found["L0.q.w"] for trial in trials)


def test_the_folder_says_what_was_run(made):
    study, folder, trials = made
    record = json.loads((folder / "study.json").read_text())
    assert record["calibration"] == dict(forwards=2, windows=2) and record["inside"] == list(study.treatment.inside)
    assert record["baseline"]["tokens"] == 5 * LENGTH and record["stats"]["L0.q"]["count"] == 2 * LENGTH * 64
    winner = Solved.load(folder / "winner.json")
    assert winner.plan.hash == ranking(trials)[0]["plan_hash"]
    winner.check(study.model, study.content, study.sites)


def test_two_processes_write_the_same_bytes(made, tmp_path):
    study, folder, _ = made
    run(tmp_path, study, jobs=2)
    assert contents(tmp_path) == contents(folder)


def test_two_threads_write_the_same_bytes(made, tmp_path):
    study, folder, _ = made
    run(tmp_path, study, threads=2)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("cut", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("torn", [0, 9])
def test_a_run_that_was_cut_short_goes_on(made, cut, torn, tmp_path, monkeypatch):
    study, folder, _ = made
    for name in ("ids.json", "calibration.npz"):
        shutil.copy(folder / name, tmp_path)
    for name in FILES:
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        keep = int(cut * len(lines)) if name == "rounds.jsonl" else 0
        (tmp_path / name).write_bytes(b"".join(lines[:keep]) + lines[keep][:torn])
    monkeypatch.setattr("lockstep.study.run.calibrate", None)  # it is not done again
    said = []
    run(tmp_path, study, say=said.append)
    assert contents(tmp_path) == contents(folder)
    assert len(said) == (2 if torn else 0) and all("the last line of a file was cut short" in line for line in said)


def test_a_finished_study_runs_nothing(made, tmp_path, monkeypatch):
    study, folder, trials = made
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(Rig, "run", None)
    assert run(tmp_path / "copy", study) == trials


def test_calibration_takes_a_forward_for_each_window(tmp_path, monkeypatch):
    study = study_of(subject_of(), num_calibration=3, num_windows=2, sweeps=())
    runs, real = [], Rig.run

    def counted(rig, first=0, last=None):
        runs.append(last is not None and last == rig.score_index)
        real(rig, first, last)

    monkeypatch.setattr(Rig, "run", counted)
    run(tmp_path, study)
    assert sum(runs) == 3


def test_runs_that_begin_later_have_the_same_figures():
    study, subject = study_of(subject_of()), subject_of()
    found = []
    with contextlib.closing(Team(2)) as team:
        stats = calibrate(subject.model, study.treatment, team, study.calibration)
        for room in (1 << 30, 0):
            bench = Bench(study, subject, stats, team, room)
            found.append(list(bench.round(range(2), range(len(study.trials)))))
    later, whole = found
    assert [outcome.windows for outcome in later] == [outcome.windows for outcome in whole]
    assert sum(outcome.layers_saved for outcome in later) > 0 == sum(outcome.layers_saved for outcome in whole)


def test_progress_counts_the_whole_study(tmp_path):
    steps = []
    study = study_of(subject_of(), sweeps=SWEEPS[1:], num_windows=3, early_stop=False)
    run(tmp_path, study, on_step=lambda *step: steps.append(step))
    num_trials = len(study.trials) + 1  # and the model in float
    rounds = [step for step in steps if step[0] == "measuring"]
    assert [step[0] for step in steps[:2]] == ["calibrating"] * 2 and len(rounds) == 2 * num_trials
    assert {step[3] for step in rounds} == {3 * num_trials} and rounds[-1][4] and rounds[-1][2] == 3 * num_trials
    assert rounds[0][1:3] == (f"round 1 of 2, plan 1 of {num_trials}", 2)


def test_what_is_clearly_worse_ends_early(tmp_path):
    sweep = Sweep("product", {"norm": ("norm*", ("i8", "u2", "u3"))})
    study = study_of(subject_of(), Plan([["*", "i16"]]), [sweep], num_windows=6, round=4)
    trials = {trial["name"]: trial for trial in run(tmp_path, study)}
    status = {name: (trial["status"], trial["windows"]) for name, trial in trials.items()}
    assert status["base"] == status["norm i8"] == ("done", 6) and status["norm u2"] == ("stopped", 4)
    whole = study_of(subject_of(), Plan([["*", "i16"]]), [sweep], num_windows=6, round=4, early_stop=False)
    assert all(trial["status"] == "done" for trial in run(tmp_path / "whole", whole))


def test_a_plan_that_cannot_be_is_recorded_and_the_others_run(tmp_path, monkeypatch):
    sweep = Sweep("product", {"q": ("L0.q", ("u8", "u8:p99", "mxint8"))})
    study, real = study_of(subject_of(), Plan(), [sweep], num_windows=2), Stat.solve

    def solve(stat, spec):
        if spec.percentile:
            raise ValueError(f"site {stat.site}: calibration saw no number")
        return real(stat, spec)

    monkeypatch.setattr(Stat, "solve", solve)
    trials = {trial["name"]: trial for trial in run(tmp_path, study)}
    failed = trials.pop("q u8:p99")
    assert failed["status"] == "failed" and failed["reason"] == "site L0.q: calibration saw no number"
    assert "metrics" not in failed and all(trial["status"] == "done" for trial in trials.values())


def test_weights_in_a_format_of_their_own_are_refused_before_anything_runs():
    subject = load_subject(str(folder("plain")), LENGTH, "q8_0", "f32")
    with pytest.raises(ValueError, match=r"site L0.q.w: its layer multiplies q8_0, and rounded weights are float32"):
        study_of(subject)
    assert study_of(subject, Plan([["L0.q", "u8"], ["embed.w", "u8"]]), ()).trials


def test_without_calibration_only_grids_without_ranges_can_be(tmp_path):
    sweep = Sweep("product", {"q": ("L0.q", ("u8", "mxint8", "u8/row"))})
    study = study_of(subject_of(), Plan(), [sweep], num_windows=2, num_calibration=0)
    status = {trial["name"]: trial["status"] for trial in run(tmp_path, study)}
    assert status == {"q u8": "failed", "base": "done", "q mxint8": "done", "q u8/row": "done"}


# ------------------------------------------------------------ what goes wrong


def test_a_folder_of_another_study(made):
    study, folder, _ = made
    with pytest.raises(ValueError, match="it holds a study of other trials, another model or other texts"):
        run(folder, replace(study, trials=study.trials[:3]))


def test_a_folder_in_which_another_run_is_at_work(made):
    study, folder, _ = made
    with held(folder), pytest.raises(ValueError, match="another run is at work in this folder"):
        run(folder, study)


def test_lines_that_somebody_changed(made, tmp_path):
    study, folder, _ = made
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "trials.jsonl"
    path.write_text(path.read_text().replace('"status":"done"', '"status":"failed"', 1))
    with pytest.raises(
        ValueError, match=r"trials.jsonl, line 1: it is not what .*rounds.jsonl gives; .* only a new folder"
    ):
        run(tmp_path / "copy", study)
    (tmp_path / "copy" / "rounds.jsonl").write_text("{}\nnothing\n")
    with pytest.raises(ValueError, match=r"rounds.jsonl, line 2: it is no JSON: .* at column 1; .* a new folder"):
        run(tmp_path / "copy", study)
    (tmp_path / "copy" / "rounds.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"rounds.jsonl, line 1: it is no record of a trial in a round"):
        run(tmp_path / "copy", study)


def test_scores_that_do_not_follow_from_rounds_are_refused_without_running(made, tmp_path):
    """The check of `show` and `confirm`, which accepts a study whose last line is still being written."""
    _, folder, _ = made
    rounds, trials = (Lines(folder / name, reads_only=True).records for name in ("rounds.jsonl", "trials.jsonl"))
    path, text = tmp_path / "rounds.jsonl", (folder / "rounds.jsonl").read_bytes()
    path.write_bytes(text + b'{"round":')
    check_follows(tmp_path, trials)
    assert path.read_bytes() == text + b'{"round":'
    window = trials[1]["window_nll"]
    for changed in (
        dict(metrics=trials[1]["metrics"] | dict(nll=5.0, delta_nll=-5.0)),
        dict(window_nll=[window[0] + 1, *window[1:]]),
        dict(status="failed"),
    ):
        with pytest.raises(ValueError, match=r"trials.jsonl, line 2: its scores are not those that .*rounds.jsonl"):
            check_follows(tmp_path, [trials[0], trials[1] | changed])
    path.write_bytes(text + line_of(rounds[0]))
    with pytest.raises(ValueError, match=r"rounds.jsonl, line \d+: it is a second record of round 0"):
        check_follows(tmp_path, trials)
    nll_squares = text.replace(b'"nll_squares":', b'"nll_squares":1', 1)
    assert nll_squares != text
    path.write_bytes(nll_squares)
    with pytest.raises(ValueError, match=r"rounds.jsonl, line 1: its sha256 is not that of what it says"):
        check_follows(tmp_path, trials)


def test_a_full_disk_names_the_file_and_loses_nothing(made, tmp_path, monkeypatch):
    study, folder, _ = made
    for name in ("ids.json", "calibration.npz"):
        shutil.copy(folder / name, tmp_path)
    real, left = records.write_all, [5]

    def write(file, line):
        left[0] -= 1
        if left[0] < 0:
            file.write(line[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, line)

    monkeypatch.setattr(records, "write_all", write)
    with pytest.raises(OSError, match="No space left on device") as error:
        run(tmp_path, study)
    assert str(error.value.filename).startswith(str(tmp_path)) and error.value.filename.endswith(".jsonl")
    kept = (tmp_path / "rounds.jsonl").read_bytes()
    assert kept and (folder / "rounds.jsonl").read_bytes().startswith(kept)
    monkeypatch.undo()
    run(tmp_path, study)
    assert contents(tmp_path) == contents(folder)


def test_a_report_can_be_made_of_it(made):
    _, folder, trials = made
    data = report_data(folder)
    assert data["ranking"] == [trial["id"] for trial in ranking(trials)]
    assert data["verdict"]["winner"] == data["ranking"][0]
    [group] = data["sensitivity"]
    assert {row["trial"] for row in group["rows"]} == {t["id"] for t in trials if "site" in t["swept"]}
    assert data["sites"]["L0.k.all"]["grids"] and not data["torn"]
    assert write_report(folder).read_text("utf-8").count("<tr") > len(trials)


def test_a_process_that_is_lost_is_told(made):
    study, _, _ = made
    with contextlib.closing(Team(1)) as team, Workers(study, subject_of(), {}, 2, 2, team) as workers:
        outcomes = workers.round(range(2), range(len(study.trials)))
        next(outcomes)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(OSError, match=r"a process of the study ended before its work was done \(exit code -9\)"):
            list(outcomes)
            list(workers.round(range(2), [0]))
