"""Confirmation: both twins give the same bits; if they do not, the first token that differs is named."""

import contextlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lockstep.ops.rounded.grids import INVERSE, SCALE
from lockstep.runtime.threads import Team
from lockstep.study import confirm
from lockstep.study.confirm import confirm_study, first_difference
from lockstep.study.run import ranking
from lockstep.study.scoring.evaluate import PREFILL, rig_for
from tests.study.test_run import BASE, SWEEPS, run, study_of, subject_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(Study, its folder, the lines of its trials)."""
    folder = tmp_path_factory.mktemp("study")
    study = study_of(subject_of(), num_windows=3)
    return study, folder, run(folder, study)


def confirmed(folder, study, top=2):
    with contextlib.closing(Team(1)) as team:
        return confirm_study(folder, study, subject_of(), team, top)


def test_the_best_have_the_same_bits(made):
    study, folder, trials = made
    rows = confirmed(folder, study)
    best = ranking(trials)[:2]
    assert [row["id"] for row in rows] == [trial["id"] for trial in best]
    assert [row["parity"] for row in rows] == [dict(equal=True)] * 2
    assert [(row["fast_rank"], row["confirmed_rank"]) for row in rows] == [(1, 1), (2, 2)]
    for row, trial in zip(rows, best, strict=True):
        assert row["metrics"].items() <= trial["metrics"].items()
    assert [json.loads(line) for line in (folder / "confirm.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize("site", ["L1.p", "L0.v.all", "L0.ctx"])
def test_one_wrong_scale_of_one_head_turns_it_red(made, site, monkeypatch):
    study, folder, _ = made

    def wrong(subject, treatment, team, length, twin):
        rig = rig_for(subject, treatment, team, length, twin)
        real = rig.set_grids

        def set_grids(grids):
            real(grids)
            if twin == PREFILL and site in grids:
                rig.rounded.grids[site][-1, SCALE] *= 2
                rig.rounded.grids[site][-1, INVERSE] /= 2

        rig.set_grids = set_grids
        return rig

    monkeypatch.setattr(confirm, "rig_for", wrong)
    [row] = confirmed(folder, study, 1)
    first = row["parity"]["first"]
    assert not row["parity"]["equal"] and first["window"] == 0 and first["fast"] != first["prefill"]
    assert first["score"] in ("nll", "kl", "delta_p", "same_top", "top")


def test_scores_of_the_same_bits_have_no_difference():
    scores = np.zeros((3, 8), np.float32)
    other = scores.copy()
    assert first_difference(scores, other) is None
    other[2, 0] = -0.0
    assert first_difference(scores, other) == dict(token=2, score="nll", fast=0.0, prefill=-0.0)


def test_nothing_to_confirm(made, tmp_path):
    with pytest.raises(ValueError, match="no trial is done yet, so there is nothing to confirm"):
        confirmed(tmp_path, made[0])


def test_a_scale_in_the_keys_is_confirmed(made, tmp_path):
    """A scale of 1/4: exact, so that scores equal those of the study that multiplies by the scale."""
    _, _, trials = made
    study = study_of(subject_of(), replace(BASE, fuse_scale="k"), SWEEPS[:1], num_windows=3)
    found = {trial["name"]: trial for trial in run(tmp_path, study)}
    assert all(found[trial["name"]]["window_nll"] == trial["window_nll"] for trial in trials if trial["name"] in found)
    assert len(found) == 5 and found["base"]["plan"]["fuse_scale"] == "k"
    assert [row["parity"] for row in confirmed(tmp_path, study)] == [dict(equal=True)] * 2


@pytest.mark.parametrize("name", ["rounds.jsonl", "calibration.npz"])
def test_files_without_which_nothing_can_be_confirmed(made, name, tmp_path):
    study, folder, _ = made
    shutil.copytree(folder, tmp_path / "study")
    (tmp_path / "study" / name).unlink()
    said = "it has not all windows of trial float" if name == "rounds.jsonl" else "it is missing"
    with pytest.raises(ValueError, match=rf"{name}: {said}.*; `lockstep ptq run RECIPE --out .*study` makes"):
        confirmed(tmp_path / "study", study)


def test_the_best_of_some_trials_is_not_the_best(made, tmp_path):
    study, folder, trials = made
    shutil.copytree(folder, tmp_path / "study")
    path = tmp_path / "study" / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"it has {len(trials) - 1} of {len(trials)} trials, and the best may be"):
        confirmed(tmp_path / "study", study)
    with pytest.raises(ValueError, match="it holds a study of other trials"):
        confirmed(tmp_path / "study", replace(study, trials=study.trials[:2]))
