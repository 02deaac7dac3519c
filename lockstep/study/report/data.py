"""The content of report.json and of the report's page, computed from the files in a study's folder."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.ptq.plan import Plan
from lockstep.study.records import TRIALS, WINNER, going_on
from lockstep.study.report.folder import StudyFolder, read_folder
from lockstep.study.report.pairs import difference, from_float
from lockstep.study.report.sites import sensitivity, sites_table
from lockstep.study.run import ranking

FORM = 2  # of report.json; another number when its content means something else
ERRORS, SIZES = ("delta_nll", "kl_mean"), ("weight_bytes", "kv_bytes")
ELSEWHERE = ("form", "sites", "stats", "model", "baseline", "num_trials")  # keys of study.json that are not provenance
TRIAL_KEYS = (
    "id",
    "name",
    "status",
    "windows",
    "window_nll",
    "swept",
    "forwards",
    "layers_run",
    "layers_saved",
    "reason",
    "integer",
)


def report_data(folder: Path) -> dict[str, Any]:
    """All that a report says, as JSON can hold it. ValueError, with file and key, for a folder that is no study's."""
    found = read_folder(folder)
    trials = [_trial(trial, folder) for trial in found.trials]
    ranked = ranking(trials)
    winner = _winner(found, trials, ranked, folder)
    return dict(
        form=FORM,
        model=found.study["model"],
        baseline=found.study.get("baseline"),
        verdict=verdict(winner, ranked, confirmed_of(found.confirmed)),
        ranking=[trial["id"] for trial in ranked],
        frontiers={f"{error}/{size}": frontier(ranked, size, error) for error in ERRORS for size in SIZES},
        trials=trials,
        sensitivity=sensitivity(trials, found.study["sites"]),
        sites=sites_table(found.study, found.trials, str(folder)),
        confirmed=found.confirmed,
        work=work(found.study, trials),
        torn=found.torn,
        provenance={key: value for key, value in found.study.items() if key not in ELSEWHERE},
        recipe=found.recipe,
        winner_recipe=_winner_recipe(found, winner),
    )


def _trial(trial: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A trial as the report keeps it: its sites' figures are with the sites."""
    try:
        plan = Plan.from_table(trial["plan"])
    except ValueError as error:
        raise ValueError(f"{folder / TRIALS}: trial {trial['id']!r}: {error}") from None
    kept = {key: trial[key] for key in TRIAL_KEYS if trial.get(key) is not None}
    metrics = {key: value for key, value in (trial.get("metrics") or {}).items() if not isinstance(value, (list, dict))}
    return kept | dict(metrics=metrics, plan=plan.to_table(), plan_text=plan.to_toml(), plan_hash=plan.hash)


def frontier(trials: Iterable[Mapping[str, Any]], size: str, error: str) -> list[Any]:
    """Ids of the trials that no other beats in bytes and in error, the smallest first."""
    both = [t for t in trials if t["metrics"].get(size) is not None and t["metrics"].get(error) is not None]
    best, made = float("inf"), []
    for trial in sorted(both, key=lambda t: (t["metrics"][size], t["metrics"][error])):
        if trial["metrics"][error] < best:
            best = trial["metrics"][error]
            made.append(trial["id"])
    return made


# ---------------------------------------------------------------- the verdict


def _winner(found: StudyFolder, trials: Sequence[Any], ranked: Sequence[Any], folder: Path) -> Any:
    """The trial whose plan is in winner.json; without that file the first by confirmed rank, then by the fast one."""
    if found.winner is not None:
        return _of_plan(found, trials, folder)
    places = {row["id"]: row["confirmed_rank"] for row in found.confirmed if row.get("confirmed_rank") is not None}
    return min((t for t in ranked), key=lambda t: places.get(t["id"], len(places) + 1), default=None)


def _winner_recipe(found: StudyFolder, winner: Any) -> str | None:
    """The winner as a recipe, or as a plan where winner.toml is not there, or not its own."""
    if winner is None:
        return None
    plan = tomllib.loads(found.winner_recipe).get("plan")
    return found.winner_recipe if plan == winner["plan"] else winner["plan_text"]


def _of_plan(found: StudyFolder, trials: Sequence[Any], folder: Path) -> Any:
    """The trial that has the plan of winner.json."""
    anew = f"delete {WINNER}: {going_on(folder)} makes it anew"
    try:
        wanted = Plan.from_table((found.winner or {})["plan"]).hash
    except ValueError as error:
        raise ValueError(f"{folder / WINNER}: {error}; {anew}") from None
    for trial in trials:
        if trial["plan_hash"] == wanted:
            return trial
    if found.lacking:
        raise ValueError(f"{found.lacking}, of which {WINNER} has one")
    raise ValueError(f"{folder / WINNER}: no trial of {TRIALS} has its plan ({wanted[:12]}); {anew}")


def verdict(winner: Any, ranked: Sequence[Any], confirmed: Mapping[Any, Any]) -> dict[str, Any]:
    """Which trial won, and which others may be as good.

    has_interval: whether its loss has one, without which nothing is said of noise. like_float: it holds 0. like: ids
    of other trials whose difference to it has an interval that holds 0, window by window. next: the best of the others
    and its difference, None if there is none. metrics: those of the confirmation where there was one.
    """
    if winner is None:
        return dict(
            winner=None, has_interval=False, like_float=False, like=[], next=None, metrics={}, is_confirmed=False
        )
    others = [(trial["id"], difference(trial, winner)) for trial in ranked if trial is not winner]
    loss = from_float(winner)
    return dict(
        winner=winner["id"],
        has_interval=loss.low is not None,
        like_float=loss.is_noise,
        like=[id for id, apart in others if apart.is_noise],
        next=dict(id=others[0][0], **others[0][1]._asdict()) if others else None,
        metrics=metrics_of(winner, confirmed),
        is_confirmed=bool(confirmed.get(winner["id"])),
    )


def metrics_of(trial: Mapping[str, Any], confirmed: Mapping[Any, Any]) -> dict[str, Any]:
    """A trial's metrics, confirmed ones in the place of fast ones."""
    return {**trial["metrics"], **((confirmed.get(trial["id"]) or {}).get("metrics") or {})}


def confirmed_of(rows: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    """Confirmations by trial."""
    return {row["id"]: row for row in rows}


# ---------------------------------------------------------------- what it took


def work(study: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Forward passes and layers, summed over trials; what no trial counted is left out."""
    made: dict[str, Any] = {}
    calibration = study.get("calibration")
    if isinstance(calibration, Mapping) and calibration.get("forwards") is not None:
        made["calibration_forwards"] = calibration["forwards"]
    for key in ("forwards", "layers_run", "layers_saved"):
        counts = [trial[key] for trial in trials if trial.get(key) is not None]
        if counts:
            made[key] = sum(counts)
    total = study.get("num_trials")
    if isinstance(total, int) and total > len(trials):
        made["to_come"] = total - len(trials)
    return made | {status: sum(t["status"] == status for t in trials) for status in ("done", "stopped", "failed")}
