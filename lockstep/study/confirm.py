"""Runs the best trials again on the twin `prefill`, head by head as hardware does: all scores must have equal bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.ops.sampling import score
from lockstep.ptq.observers import Stat
from lockstep.ptq.solved import Solved
from lockstep.runtime.threads import Team
from lockstep.study.kept import check_same, load_stats
from lockstep.study.records import CALIBRATION, CONFIRM, ROUNDS, TRIALS, Lines, going_on, held, line_of, save
from lockstep.study.rounds import ANEW, FLOAT_NAME, check_follows, read_rounds
from lockstep.study.run import OnStep, ranking
from lockstep.study.scoring.evaluate import FLOAT, PREFILL, PREFILL_REFERENCE, Setup, rig_for
from lockstep.study.scoring.figures import compared_figures, text_figures, window_figures
from lockstep.study.scoring.in_integers import InIntegers
from lockstep.study.scoring.rig import Rig
from lockstep.study.scoring.subject import Subject
from lockstep.study.trials import Study

COLUMNS = {score.NLL: "nll", score.KL: "kl", score.DELTA_P: "delta_p", score.SAME_TOP: "same_top", score.TOP: "top"}


def confirm_study(
    folder: Path, study: Study, subject: Subject, team: Team, top: int, on_step: OnStep = lambda *_: None
) -> list[dict[str, Any]]:
    """Runs the `top` best trials of a study on `prefill`, on all windows, and writes confirm.jsonl. A line has a
    trial's figures on `prefill`, both ranks, whether all scores have the bits of `prefill_reference` (or the first
    score that differs), and the figures of the same plan in the other arithmetic, see `in_integers`.

    ValueError for a folder of another study, and for one in which no trial, or not every trial, is done.
    """
    with held(folder):
        check_same(folder, study)
        trials = Lines(folder / TRIALS).records
        best = ranking(trials)[:top]
        if not best:
            raise ValueError(
                f"{folder}: no trial is done yet, so there is nothing to confirm; {going_on(folder)} goes on with them"
            )
        if len(trials) < len(study.trials):
            raise ValueError(
                f"{folder / TRIALS}: it has {len(trials)} of {len(study.trials)} trials, and the best may be among the "
                f"others; {going_on(folder)} makes them"
            )
        ids = [trial["id"] for trial in best]
        measured = _measured(folder, study, [FLOAT_NAME, *ids])
        check_follows(folder, trials)
        confirmation = _Confirmation(folder, study, subject, team, measured)
        made = confirmation.run(ids, on_step)
        in_integers = InIntegers(study, subject, team)
        for done, record in enumerate(made, 1):
            record.update(in_integers.record(confirmation.setup(record["id"]), record["metrics"]))
            on_step("in the other arithmetic", f"plan {done} of {len(made)}", done, len(made))
        content = b"".join(map(line_of, made))
        save(folder / CONFIRM, content)
    return made


class _Confirmation:
    """Both twins of a study's model; the fast twin is made only if a score differs. measured: {trial: figures of all
    windows on the fast twin, with digests of their scores}."""

    def __init__(
        self, folder: Path, study: Study, subject: Subject, team: Team, measured: Mapping[str, list[dict[str, Any]]]
    ) -> None:
        self._study, self._subject, self._team = study, subject, team
        stats = _stats(folder / CALIBRATION, study)
        self._solve = lambda plan: Solved.solve(plan, study.model_name, study.content, study.sites, stats)
        self._rig, self._fast = self._made(PREFILL), None
        self._measured = measured

    def _made(self, twin: str) -> Rig:
        return rig_for(self._subject, self._study.treatment, self._team, self._study.length, twin)

    def run(self, ids: Sequence[str], on_step: OnStep) -> list[dict[str, Any]]:
        """Runs all windows of these trials; returns the records of confirm.jsonl."""
        setups = {FLOAT_NAME: FLOAT} | {id: self.setup(id) for id in ids}
        figures: dict[str, list[dict[str, Any]]] = {name: [] for name in setups}
        first: dict[str, dict[str, Any]] = {}
        for index in range(len(self._study.evaluation)):
            base = None
            for name, setup in setups.items():
                scores = self._scores(self._rig, setup, index, base)
                base = self._rig.hidden() if base is None else base
                found = window_figures(scores, self._study.evaluation[index], name != FLOAT_NAME)
                figures[name].append(found)
                if found != self._measured[name][index] and name not in first:
                    first[name] = self._difference(setup, index, base, scores)
            done, total = index + 1, len(self._study.evaluation)
            on_step("confirming", f"window {done} of {total}", done, total)
        return self._records(ids, figures, first)

    def setup(self, id: str) -> Setup:
        """A trial's specs, grids and arithmetic."""
        [plan] = [trial.plan for trial in self._study.trials if trial.id == id]
        return Setup(plan.resolve(self._study.sites), self._solve(plan).grids, plan.arithmetic)

    def _scores(self, rig: Rig, setup: Setup, index: int, base: np.ndarray | None) -> np.ndarray:
        window = self._study.evaluation[index]
        setup.put_on(rig)
        rig.load(window.ids, window.targets, base)
        rig.run()
        return rig.scores()

    def _difference(self, setup: Setup, index: int, base: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        """The first score of a window that differs between the twins."""
        self._fast = self._fast or self._made(PREFILL_REFERENCE)
        fast = self._scores(self._fast, setup, index, base)
        return dict(window=index) | (first_difference(fast, scores) or dict(rounds="the study's were others"))

    def _records(
        self, ids: Sequence[str], figures: Mapping[str, list[dict[str, Any]]], first: Mapping[str, dict[str, Any]]
    ) -> list[dict[str, Any]]:
        base, made = figures[FLOAT_NAME], []
        names = {trial.id: trial.name for trial in self._study.trials}
        for rank, id in enumerate(ids, 1):
            found = first.get(id) or first.get(FLOAT_NAME)
            parity = dict(equal=True) if found is None else dict(equal=False, first=found)
            metrics = text_figures(figures[id], self._study.by_token) | compared_figures(figures[id], base)
            tokens = sum(len(window.ids) for window in self._study.evaluation)
            made.append(
                dict(id=id, name=names[id], fast_rank=rank, windows=len(base), tokens=tokens, parity=parity)
                | dict(metrics=metrics)
            )
        order = sorted(made, key=lambda record: (record["metrics"]["delta_nll"], record["fast_rank"]))
        for rank, record in enumerate(order, 1):
            record["confirmed_rank"] = rank
        return made


def _stats(path: Path, study: Study) -> dict[str, Stat]:
    """Statistics of all sites; empty where nothing is calibrated. ValueError if their file is missing."""
    if path.exists():
        return load_stats(path)
    if study.calibration and study.treatment.sites:
        raise ValueError(f"{path}: it is missing; {going_on(path.parent)} makes it anew")
    return {}


def _measured(folder: Path, study: Study, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """{trial: figures of all its windows, with digests of their scores}. ValueError, with file and line, for lines that
    are missing or were changed."""
    path, found = folder / ROUNDS, dict[str, list[dict[str, Any]]]()
    for (_, name), record in sorted(read_rounds(Lines(path, ANEW)).items()):
        found.setdefault(name, []).extend(record.get("windows", ()))
    for name in names:
        if len(found.get(name, ())) != len(study.evaluation):
            raise ValueError(
                f"{path}: it has not all windows of trial {name}, which is to be confirmed; {going_on(folder)} makes "
                f"them anew"
            )
    return found


def first_difference(fast: np.ndarray, slow: np.ndarray) -> dict[str, Any] | None:
    """Token, score and both values at the first place where two arrays of scores [tokens, NUM_SCORES] differ in a bit;
    None if they are equal."""
    columns = list(COLUMNS)
    differs = fast[:, columns].view(np.int32) != slow[:, columns].view(np.int32)
    if not differs.any():
        return None
    token, column = (int(i) for i in np.argwhere(differs)[0])
    at = token, columns[column]
    return dict(token=token, score=COLUMNS[columns[column]], fast=float(fast[at]), prefill=float(slow[at]))
