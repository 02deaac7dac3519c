"""A study's report: one HTML file that needs nothing else, the same as JSON, and a table for terminals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.study.records import save_text
from lockstep.study.report.data import report_data
from lockstep.study.report.html import COLUMNS, METRICS, page, torn_words
from lockstep.study.report.markup import MINUS, interval

REPORT, DATA = "report.html", "report.json"
MAX_NAME = 44  # characters of a trial's name


def write_report(folder: Path) -> Path:
    """Writes report.html and report.json into a study's folder; returns the path of report.html.

    Equal folders give equal bytes. ValueError, with file and key, for what is missing or wrong in the folder; OSError,
    with the path, if it cannot be written.
    """
    data = report_data(folder)
    save_text(folder / DATA, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    save_text(folder / REPORT, page(data))
    return folder / REPORT


def text_table(folder: Path) -> str:
    """The verdict and all trials, the best first, why trials failed, and what is cut short, as lines of text.

    ValueError as `write_report`.
    """
    data = report_data(folder)
    places = {id: place for place, id in enumerate(data["ranking"], 1)}
    trials = sorted(data["trials"], key=lambda trial: places.get(trial["id"], len(places) + 1))
    keys = [key for key in COLUMNS if any(trial["metrics"].get(key) is not None for trial in trials)]
    heads = ["#", "trial", *(METRICS[key].heading for key in keys), "interval" if "delta_nll" in keys else ""]
    rows = [_row(trial, places.get(trial["id"]), keys) for trial in trials]
    notes = [f"{trial['name']} failed: {trial['reason']}" for trial in trials if trial.get("reason")]
    notes += map(torn_words, data["torn"])
    return "\n".join([verdict_line(data), "", *_aligned([heads, *rows]), *[""][: len(notes)], *notes]) + "\n"


def verdict_line(data: Mapping[str, Any]) -> str:
    """Which trial won, its loss with its interval, and which others are within noise of it."""
    verdict, names = data["verdict"], {trial["id"]: trial["name"] for trial in data["trials"]}
    if verdict["winner"] is None:
        return f"{data['model']['name']}: no trial is done yet"
    noise = ["the model in float"] if verdict["like_float"] else []
    noise += [f"{len(verdict['like'])} other{'s' if len(verdict['like']) > 1 else ''}"] if verdict["like"] else []
    within = f", within noise of {' and '.join(noise)}" if noise else ""
    loss = METRICS["delta_nll"].to_text(verdict["metrics"]["delta_nll"])
    ends = interval(verdict["metrics"].get("delta_low"), verdict["metrics"].get("delta_high"))
    return f"{data['model']['name']}: {names[verdict['winner']]}, ΔNLL {f'{loss} {ends}'.replace(MINUS, '-')}{within}"


def _row(trial: Mapping[str, Any], place: int | None, keys: list[str]) -> list[str]:
    metrics = trial["metrics"]
    name = trial["name"] if len(trial["name"]) <= MAX_NAME else trial["name"][: MAX_NAME - 1] + "…"
    cells = [METRICS[key].to_text(metrics.get(key)) for key in keys]
    last = (
        interval(metrics.get("delta_low"), metrics.get("delta_high")) if trial["status"] == "done" else trial["status"]
    )
    return [str(place or ""), name, *(text.replace(MINUS, "-") for text in [*cells, last])]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines of equal columns: names and the last column aligned left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    side = lambda i, cell: cell.ljust(widths[i]) if i in (1, len(widths) - 1) else cell.rjust(widths[i])
    return ["  ".join(side(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]
