"""Runs a study: calibration once, then trials in rounds of windows; finished work is never repeated.

rounds.jsonl gets a line for each trial and round as soon as the round of that trial is done, and all other results
follow from these lines: a run that goes on after an interruption passes through the same rounds, and takes the finished
ones from the file.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.ptq.integer import INTEGER
from lockstep.ptq.observers import Stat
from lockstep.ptq.solved import Solved
from lockstep.runtime.threads import Team
from lockstep.study.kept import check_same, load_stats, save_ids, save_stats
from lockstep.study.records import CALIBRATION, ROUNDS, STUDY, TIMES, TRIALS, WINNER, Lines, Replayed, held, save_text
from lockstep.study.rounds import ANEW, FLOAT_NAME, read_rounds, sealed
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.figures import compared_figures, mean_and_error, nll_of, text_figures
from lockstep.study.scoring.subject import Subject
from lockstep.study.summary import Figures, study_record
from lockstep.study.trial_bench import FLOAT_TRIAL, Outcome
from lockstep.study.trials import Study
from lockstep.study.workers import Elsewhere, Workers

CLEARLY = 3.0  # standard errors by which a trial must be worse than the best to be stopped early
LEAST_WINDOWS = 4  # with fewer windows a standard error is too uncertain to stop a trial
DONE, STOPPED, FAILED = "done", "stopped", "failed"
# called with words for the phase of the work, words for the place in it, how much is done and how much there is at
# most; at the end of a round also with True
OnStep = Callable[..., object]


@dataclass(frozen=True)
class RunOptions:
    """How a study is run, which changes no bit of its results. threads: of all jobs together. on_step: see OnStep. say:
    called with lines for the user. elsewhere: starts the jobs on other machines, with `threads` each; None: here."""

    jobs: int = 1
    threads: int = 1
    on_step: OnStep = lambda *_: None
    say: Callable[[str], object] = lambda line: None
    elsewhere: Elsewhere | None = None


def run_study(folder: Path, study: Study, subject: Subject, team: Team, options: RunOptions) -> list[dict[str, Any]]:
    """Runs a study in its folder, or goes on with it. Returns the lines of trials.jsonl.

    ValueError for a folder with the files of another study; OSError, with the path, for a file that cannot be written:
    lines that were written before stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        check_same(folder, study)
        save_ids(folder, study)
        stats = _calibrated(folder, study, subject, team, options)
        with Workers(study, subject, stats, options.jobs, options.threads, team, options.elsewhere) as workers:
            return _Run(folder, study, subject, stats, workers, options).run()


# ------------------------------------------------------------ calibration


def _calibrated(folder: Path, study: Study, subject: Subject, team: Team, options: RunOptions) -> dict[str, Stat]:
    """Statistics of all sites: from the folder, or from one forward pass over each calibration window."""
    path = folder / CALIBRATION
    if path.exists():
        return load_stats(path)
    if not study.calibration or not study.treatment.sites:
        return {}
    step = lambda done, total: options.on_step("calibrating", f"window {done} of {total}", done, total)
    stats = calibrate(subject.model, study.treatment, team, study.calibration, step)
    save_stats(path, stats)
    return stats


# ------------------------------------------------------------ rounds


class _Run:
    """One run through all rounds. windows: {trial: figures of each window that it has run so far}."""

    def __init__(
        self,
        folder: Path,
        study: Study,
        subject: Subject,
        stats: Mapping[str, Stat],
        workers: Workers,
        options: RunOptions,
    ) -> None:
        self._folder, self._study, self._stats, self._workers, self._options = folder, study, stats, workers, options
        self._lines, self._trials = Lines(folder / ROUNDS, ANEW), Replayed(folder / TRIALS, folder / ROUNDS)
        self._times, self._figures = Lines(folder / TIMES), Figures(study, subject, stats)
        for lines in (self._lines, self._trials, self._times):
            if lines.was_torn:
                options.say(f"{folder}: the last line of a file was cut short and is left out: it is made again")
        self._known = read_rounds(self._lines)
        self.windows: dict[int, list[dict[str, Any]]] = {t: [] for t in range(FLOAT_TRIAL, len(study.trials))}
        self._layers = {t: [0, 0] for t in self.windows}
        self._weights: dict[int, dict[str, float | None]] = {t: {} for t in self.windows}
        self._written: list[dict[str, Any]] = []
        self._windows_run = 0  # in this run, of all trials

    def run(self) -> list[dict[str, Any]]:
        active, rounds = list(range(len(self._study.trials))), self._study.rounds()
        for number, windows in enumerate(rounds):
            failed = self._round(number, windows, active)
            active = [trial for trial in active if trial not in failed]
            if number + 1 < len(rounds):
                stopped = self._clearly_worse(active)
                for trial in stopped:
                    self._write(trial, STOPPED)
                active = [trial for trial in active if trial not in stopped]
            self._save_study()
        for trial in active:
            self._write(trial, DONE)
        self._save_winner()
        return self._written

    def _round(self, number: int, windows: range, active: Sequence[int]) -> set[int]:
        """Runs the trials of a round that rounds.jsonl does not have yet; returns the trials that failed."""
        trials = [FLOAT_TRIAL, *active]
        if any((number, self._name(trial)) not in self._known for trial in trials):
            self._run_round(number, windows, active)
        failed = set()
        for trial in trials:
            record = self._known[number, self._name(trial)]
            if "failed" in record:
                if trial == FLOAT_TRIAL:
                    raise ValueError(f"the model in float: {record['failed']}")
                self._write(trial, FAILED, record["failed"])
                failed.add(trial)
            else:
                if len(record["windows"]) != len(windows):
                    raise ValueError(
                        f"{self._lines.path}: round {number} of trial {record['trial']} has {len(record['windows'])} "
                        f"windows, expected {len(windows)}; it is of a study with other rounds, expected a new folder"
                    )
                self.windows[trial] += record["windows"]
                self._weights[trial] |= record.get("weights", {})
                self._layers[trial] = [a + b for a, b in zip(self._layers[trial], record["layers"], strict=True)]
        return failed

    def _run_round(self, number: int, windows: range, active: Sequence[int]) -> None:
        """Runs the trials of a round that are not known yet, and always the float model and the base plan, since other
        trials begin with the states that these leave."""
        wanted = [trial for trial in active if trial == 0 or (number, self._name(trial)) not in self._known]
        before = time.perf_counter()
        for done, outcome in enumerate(self._workers.round(windows, wanted), 1):
            record = self._record(number, outcome, windows)
            key, now = (number, record["trial"]), time.perf_counter()
            if key not in self._known:
                self._lines.add(record)
                self._times.add(dict(round=number, trial=record["trial"], seconds=round(now - before, 4)))
                self._known[key] = record
            elif self._known[key] != record:
                raise ValueError(
                    f"{self._lines.path}: trial {record['trial']} of round {number} gives other figures now"
                )
            before = now
            self._say_step(number, len(active) + 1, done, len(wanted) + 1)

    def _say_step(self, number: int, num_active: int, done: int, num_wanted: int) -> None:
        """Reports that `done` trials of a round are done. Work is counted in windows of a trial; every active trial is
        assumed to run in all later rounds, too."""
        sizes = [len(windows) for windows in self._study.rounds()]
        self._windows_run += sizes[number]
        left = sizes[number] * (num_wanted - done) + num_active * sum(sizes[number + 1 :])
        where = f"round {number + 1} of {len(sizes)}, plan {done} of {num_wanted}"
        self._options.on_step("measuring", where, self._windows_run, self._windows_run + left, done == num_wanted)

    def _record(self, number: int, outcome: Outcome, windows: range) -> dict[str, Any]:
        made: dict[str, Any] = dict(round=number, trial=self._name(outcome.trial))
        if outcome.failure is not None:
            window, why = outcome.failure
            return sealed(made | dict(failed=why if window < 0 else f"window {window}: {why}"))
        if number == 0 and outcome.weights:
            made["weights"] = outcome.weights
        layers = [outcome.layers_run, outcome.layers_saved]
        return sealed(made | dict(layers=layers, windows=[outcome.windows[window] for window in windows]))

    def _name(self, trial: int) -> str:
        return FLOAT_NAME if trial == FLOAT_TRIAL else self._study.trials[trial].id

    def _clearly_worse(self, active: Sequence[int]) -> list[int]:
        """Trials that may stop early and are clearly worse than the best one, by differences window by window."""
        if not active or len(self.windows[FLOAT_TRIAL]) < LEAST_WINDOWS:
            return []
        best = min(active, key=lambda trial: (math.fsum(map(nll_of, self.windows[trial])), trial))
        return [t for t in active if self._study.trials[t].may_stop and t != best and self._is_worse(t, best)]

    def _is_worse(self, trial: int, best: int) -> bool:
        pairs = zip(self.windows[trial], self.windows[best], strict=True)
        mean, error = mean_and_error([nll_of(a) - nll_of(b) for a, b in pairs])
        return error is not None and mean - CLEARLY * error > 0

    # ------------------------------------------------------------ files

    def _write(self, index: int, status: str, reason: str | None = None) -> None:
        """Adds a trial to trials.jsonl."""
        trial, windows = self._study.trials[index], self.windows[index]
        made: dict[str, Any] = dict(
            id=trial.id,
            name=trial.name,
            swept=dict(trial.swept),
            plan=trial.plan.to_table(),
            plan_hash=trial.plan.hash,
            status=status,
            windows=len(windows),
        )
        if reason is not None:
            made["reason"] = reason
        if windows:
            specs = trial.plan.resolve(self._study.sites)
            base = self.windows[FLOAT_TRIAL][: len(windows)]
            text = text_figures(windows, self._study.by_token)
            made["metrics"] = text | compared_figures(windows, base) | self._figures.sizes(specs)
            made["window_nll"] = [nll_of(window) for window in windows]
            made["forwards"] = len(windows)
            made["layers_run"], made["layers_saved"] = self._layers[index]
            grids = self._solved(index).grids
            made["sites"] = self._figures.sites(specs, grids, self._weights[index])
            if trial.plan.arithmetic == INTEGER:
                made["integer"] = self._figures.integer(specs)
        self._trials.add(made)
        self._written.append(made)

    def _solved(self, index: int) -> Solved:
        study = self._study
        return Solved.solve(study.trials[index].plan, study.model_name, study.content, study.sites, self._stats)

    def _save_study(self) -> None:
        windows = self.windows[FLOAT_TRIAL]
        text = text_figures(windows, self._study.by_token)
        baseline = dict(
            nll=text["nll"],
            perplexity=text["ppl"],
            perplexity_error=text["ppl_error"],
            tokens=text["tokens"],
            windows=len(windows),
            window_nll=[nll_of(window) for window in windows],
        )
        forwards = len(self._study.calibration) if self._stats else 0
        record = study_record(self._study, self._stats, forwards, self._options.threads, baseline)
        save_text(self._folder / STUDY, json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n")

    def _save_winner(self) -> None:
        """The plan of the best trial with its grids, for `serve --plan`."""
        ranked = ranking(self._written)
        if ranked:
            ids = [trial.id for trial in self._study.trials]
            self._solved(ids.index(ranked[0]["id"])).save(self._folder / WINNER)


def ranking(trials: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Trials that are done, the least loss first; among equal losses fewer weight bytes, then the earlier trial."""
    done = [trial for trial in trials if trial["status"] == DONE]
    return sorted(done, key=lambda trial: (trial["metrics"]["delta_nll"], trial["metrics"]["weight_bytes"]))
