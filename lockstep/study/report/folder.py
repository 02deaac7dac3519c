"""Reads the files of a study's folder for its report: every part is checked, and errors name what is missing."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.study.records import (
    CONFIRM,
    RECIPE,
    ROUNDS,
    STUDY,
    TRIALS,
    WINNER,
    WINNER_RECIPE,
    check_folder,
    going_on,
    reason_of,
)
from lockstep.study.rounds import check_follows

STATUSES = ("done", "stopped", "failed")
NUMBER = (int, float)
WORDS = {
    NUMBER: "a number",
    str: "a text",
    dict: "an object",
    list: "a list",
    int: "a whole number",
    bool: "true or false",
}
NEEDED = ("nll", "delta_nll")  # metrics without which a trial says nothing

ENDS = ("delta_low", "delta_high")  # of the interval of a loss; a single window has none


@dataclass(frozen=True)
class StudyFolder:
    """study: the content of study.json. trials, confirmed: lines in the order of their files. torn: files whose last
    line was cut short and left out. lacking: why some trials are missing, None if all are there. recipe, winner_recipe:
    TOML texts, empty without such a file. winner: the content of winner.json, None without the file."""

    study: Mapping[str, Any]
    trials: list[Mapping[str, Any]]
    confirmed: list[Mapping[str, Any]]
    torn: list[str]
    lacking: str | None
    recipe: str
    winner: Mapping[str, Any] | None
    winner_recipe: str


def read_folder(folder: Path) -> StudyFolder:
    """Reads a study's folder. ValueError for what is missing or wrong: it names file and key, and the command that
    makes the file anew."""
    check_folder(folder)
    study = _study(folder)
    with _made_by(going_on(folder), TRIALS):
        trials, is_torn = _lines(folder / TRIALS)
        for number, trial in enumerate(trials, 1):
            _check_trial(trial, f"{folder / TRIALS}, line {number}")
    if (folder / ROUNDS).is_file():
        check_follows(folder, trials)
    lacking = _lacking(study, len(latest(trials)), is_torn, folder)
    with _made_by(f"`lockstep ptq confirm {folder}`", CONFIRM):
        confirmed, is_confirm_torn = _lines(folder / CONFIRM)
        for number, row in enumerate(confirmed, 1):
            _check_confirmed(row, f"{folder / CONFIRM}, line {number}")
    _check_known(confirmed, {trial["id"] for trial in trials}, lacking, folder)
    with _made_by("`lockstep ptq run`, given the study's recipe,", RECIPE):
        recipe = _toml(folder / RECIPE)
    with _made_by(going_on(folder), WINNER_RECIPE):
        winner_recipe = _toml(folder / WINNER_RECIPE)
    with _made_by(going_on(folder), WINNER):
        winner = _winner(folder / WINNER)
    torn = [name for name, there in ((TRIALS, is_torn), (CONFIRM, is_confirm_torn)) if there]
    return StudyFolder(study, latest(trials), latest(confirmed), torn, lacking, recipe, winner, winner_recipe)


def _study(folder: Path) -> Mapping[str, Any]:
    path = folder / STUDY
    if not path.is_file():
        more = f"; {going_on(folder)} goes on with the study that is there" if (folder / RECIPE).is_file() else ""
        raise ValueError(
            f"{folder}: there is no {STUDY}; expected the folder of a study whose first round is done{more}"
        )
    with _made_by(going_on(folder), STUDY):
        study = _json(path, _text(path, path.read_bytes()))
        _check_study(study, str(path))
    return study


@contextlib.contextmanager
def _made_by(command: str, name: str) -> Iterator[None]:
    """Adds to errors about a file the command that makes the file anew."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; delete {name}: {command} makes it anew") from None


def _lacking(study: Mapping[str, Any], num_trials: int, is_torn: bool, folder: Path) -> str | None:
    """Why trials are missing from their file, with the command that makes them; None if all are there."""
    total = study.get("num_trials")
    if not (folder / TRIALS).is_file():
        what = "it is missing"
    elif is_torn:
        what = "its last line is cut short"
    elif not num_trials or (isinstance(total, int) and num_trials < total):
        what = f"it has {num_trials} of {total if isinstance(total, int) else 'the'} trials"
    else:
        return None
    return f"{folder / TRIALS}: {what}; {going_on(folder)} makes the others"


def _check_known(confirmed: list[Mapping[str, Any]], known: set[Any], lacking: str | None, folder: Path) -> None:
    """ValueError, with the file that is at fault, for the confirmation of a trial that trials.jsonl does not have."""
    for number, row in enumerate(confirmed, 1):
        if row["id"] not in known:
            where = f"{folder / CONFIRM}, line {number}: id is {row['id']!r:.80}, and {TRIALS} has no such trial"
            raise ValueError(f"{lacking}, of which {CONFIRM} has one" if lacking else where)


def _check_confirmed(row: Mapping[str, Any], where: str) -> None:
    need(row, "id", (*NUMBER, str), where)
    need(need(row, "parity", dict, where), "equal", bool, f"{where}: parity")
    for site, pair in (optional(row, "disagreement", dict, where) or {}).items():
        if not isinstance(pair, list) or [type(x) for x in pair] != [int, int]:
            raise ValueError(f"{where}: disagreement of {site} is {pair!r:.80}, expected [different, all] numbers")


def latest(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One row for each id, the last that was written, in the order in which ids first came."""
    return list({row["id"]: row for row in rows}.values())


def need(table: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    """The value of a key. ValueError, beginning with `where`, if the key is missing or its value has another type."""
    if key not in table:
        raise ValueError(f"{where}: {key} is missing")
    return checked(table[key], key, kind, where)


def optional(table: Mapping[str, Any], key: str, kind: Any, where: str) -> Any:
    """The value of a key as in `need`; None if the key is missing or null."""
    return None if table.get(key) is None else checked(table[key], key, kind, where)


def checked(value: Any, key: str, kind: Any, where: str) -> Any:
    """The value, if it has the type `kind`; else ValueError."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {key} is {value!r:.80}, expected {WORDS.get(kind, 'a number or a text')}")
    return value


def _check_study(study: Mapping[str, Any], where: str) -> None:
    model = need(study, "model", dict, where)
    for key in ("name", "hash"):
        need(model, key, str, f"{where}: model")
    baseline = optional(study, "baseline", dict, where)
    if baseline is not None:
        need(baseline, "nll", NUMBER, f"{where}: baseline")
    for number, site in enumerate(need(study, "sites", list, where), 1):
        need(checked(site, f"site {number}", dict, where), "name", str, f"{where}: site {number}")


def _check_trial(trial: Mapping[str, Any], where: str) -> None:
    need(trial, "id", (*NUMBER, str), where)
    need(trial, "name", str, where)
    if need(trial, "status", str, where) not in STATUSES:
        raise ValueError(f"{where}: status is {trial['status']!r:.80}, expected one of {', '.join(STATUSES)}")
    need(trial, "plan", dict, where)
    integer = optional(trial, "integer", dict, where)
    if integer is not None:
        need(integer, "layers", int, f"{where}: integer")
        need(integer, "floats", dict, f"{where}: integer")
    if trial["status"] == "done":
        metrics = need(trial, "metrics", dict, where)
        for key in NEEDED:
            need(metrics, key, NUMBER, f"{where}: metrics")
        nll = need(trial, "window_nll", list, where)
        if len(nll) != need(trial, "windows", int, where) or not nll:
            raise ValueError(f"{where}: window_nll has {len(nll)} numbers, and {trial['windows']} windows ran")
        [checked(x, "window_nll", NUMBER, where) for x in nll]
        ends = [optional(metrics, key, NUMBER, f"{where}: metrics") for key in ENDS]
        if None in ends and ends != [None, None]:
            raise ValueError(f"{where}: metrics: {ENDS[ends.index(None)]} is missing, and the other end is there")


# ---------------------------------------------------------------- files


def _lines(path: Path) -> tuple[list[Mapping[str, Any]], bool]:
    """The JSON objects of a file of lines (none without the file), and whether its last line was cut short."""
    if not path.is_file():
        return [], False
    *whole, last = path.read_bytes().split(b"\n")
    return [_json(f"{path}, line {n}", _text(path, line)) for n, line in enumerate(whole, 1)], bool(last)


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no UTF-8 text: {error}") from None


def _json(where: Any, text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: it cannot be read as JSON: {reason_of(error)}") from None
    return checked(found, "the content", dict, str(where))


def _winner(path: Path) -> Mapping[str, Any] | None:
    """The plan that won, with its grids; None if there is no file."""
    if not path.is_file():
        return None
    found = _json(path, _text(path, path.read_bytes()))
    need(found, "plan", dict, str(path))
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number of a report")


def _toml(path: Path) -> str:
    """The text of a TOML file; empty if there is no file."""
    if not path.is_file():
        return ""
    text = _text(path, path.read_bytes())
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: it cannot be read as TOML: {error}") from None
    return text
