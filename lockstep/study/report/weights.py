"""How well weights fit their grids, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.study.report.heat import site_button
from lockstep.study.report.markup import Markup, decibels, joined, tag, whole_number
from lockstep.study.report.sites import by_weight

HEADS = {"Weight": None, "Grid": None, "SQNR": "number", "Trials": "number"}


def weights_section(data: Mapping[str, Any]) -> Markup | None:
    """Signal to noise of every rounded weight on every grid that was tried, the worst first."""
    rows = by_weight(data["sites"])
    if not rows:
        return None
    words = "Signal to quantization noise of every rounded weight on every grid that was tried, the worst first."
    head = tag("tr", [tag("th", word, scope="col", class_=kind) for word, kind in HEADS.items()])
    table = tag("table", tag("thead", head), tag("tbody", map(_row, rows)), class_="sortable")
    label = "Table of weights"
    scrolled = tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=label)
    return joined([tag("p", words, class_="quiet"), scrolled])


def _row(row: Mapping[str, Any]) -> Markup:
    number = lambda text, value: tag("td", text, class_="number", data_value=value)
    cells = number(decibels(row["sqnr"]), row["sqnr"]), number(whole_number(row["trials"]), row["trials"])
    return tag("tr", tag("td", site_button(row["site"])), tag("td", row["spec"]), cells)
