"""rounds.jsonl: a line of measurements for each trial and round, with a digest. All other results of a study follow
from these lines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.study.records import ROUNDS, TRIALS, Lines, line_of
from lockstep.study.scoring.figures import compared_figures, nll_of, text_figures

FLOAT_NAME = "float"  # the float model, in the place of a trial's id
DIGEST, NUM_DIGITS = "sha256", 16  # the key of a line's digest, and its hexadecimal digits
ANEW = "what was measured cannot be made again from other files: expected a new folder"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with a digest of its content."""
    return {**record, DIGEST: hashlib.sha256(line_of(record)).hexdigest()[:NUM_DIGITS]}


def read_rounds(lines: Lines) -> dict[tuple[int, str], dict[str, Any]]:
    """{(round, trial): record}. ValueError, with file and line, for a record that was changed or is there twice."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for number, record in enumerate(lines.records, 1):
        where = f"{lines.path}, line {number}"
        whole = "failed" in record or ("windows" in record and "layers" in record)
        if not whole or not isinstance(record.get("round"), int) or not isinstance(record.get("trial"), str):
            raise ValueError(f"{where}: it is no record of a trial in a round; it was changed; {ANEW}")
        if record != sealed({name: value for name, value in record.items() if name != DIGEST}):
            raise ValueError(f"{where}: its {DIGEST} is not that of what it says; it was changed; {ANEW}")
        key = record["round"], record["trial"]
        if key in found:
            raise ValueError(f"{where}: it is a second record of round {key[0]} of trial {key[1]}; {ANEW}")
        found[key] = record
    return found


def check_follows(folder: Path, trials: Sequence[Mapping[str, Any]]) -> None:
    """ValueError, with file and line, for a trial whose scores do not follow from rounds.jsonl. trials: all lines of
    trials.jsonl in the folder, of a study that may still be running."""
    path, windows, failed = folder / ROUNDS, dict[str, list[dict[str, Any]]](), set[str]()
    for (_, name), record in sorted(
        read_rounds(Lines(path, ANEW, reads_only=True)).items(), key=lambda item: item[0][0]
    ):
        windows.setdefault(name, []).extend(record.get("windows", ()))
        if "failed" in record:
            failed.add(name)
    for number, trial in enumerate(trials, 1):
        own, base = windows.get(str(trial["id"]), []), windows.get(FLOAT_NAME, [])
        is_right = (trial["id"] in failed) == (trial["status"] == "failed")
        is_right &= (trial.get("window_nll") or []) == [nll_of(window) for window in own]
        if not is_right or (own and not _same(trial, own, base)):
            raise ValueError(
                f"{folder / TRIALS}, line {number}: its scores are not those that {path} gives; one of the two "
                f"was changed, or made by another version; only a new folder is safe"
            )


def _same(trial: Mapping[str, Any], own: list[dict[str, Any]], base: list[dict[str, Any]]) -> bool:
    """Whether a trial's metrics follow from its windows, with one of the two estimates of standard errors."""
    compared = compared_figures(own, base[: len(own)])
    metrics = trial.get("metrics") or {}
    return any((text_figures(own, by_token) | compared).items() <= metrics.items() for by_token in (False, True))
