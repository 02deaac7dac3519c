"""How much rounding a single site costs, and how well grids fit heads: bars and heat maps, as HTML tables."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.study.report.markup import MINUS, NONE, Markup, Metric, decibels, interval, joined, nats, signed, tag
from lockstep.study.report.sites import by_head

LEAST_SPREAD = 6.0  # decibels: values that are closer together than this do not span all colours
MOST_BARS = 16  # the other rows are folded away
NARROW_COLUMNS = 18  # a heat map with more columns has narrow cells
MEASURES = {"delta_nll": Metric("ΔNLL", nats), "kl_mean": Metric("KL, mean", signed)}


def sensitivity_section(data: Mapping[str, Any]) -> Markup | None:
    """For every group of one-at-a-time trials: a bar for each site, and heat maps of components by layers."""
    if not data["sensitivity"]:
        return None
    names = {trial["id"]: trial["name"] for trial in data["trials"]}
    return joined([_group(group, names) for group in data["sensitivity"]])


def _group(group: Mapping[str, Any], names: Mapping[Any, str]) -> Markup:
    single = [row for row in group["rows"] if row["is_site"]]
    there = [key for key in MEASURES if any(row.get(key) is not None for row in single)]
    has_layers = len({row["layer"] for row in single}) > 1  # in a single layer the bars already say all
    maps = [_map([row for row in single if row.get(key) is not None], key) for key in there if has_layers]
    few, more = _bars(group["rows"][:MOST_BARS], group["rows"]), group["rows"][MOST_BARS:]
    folded = tag("details", tag("summary", f"{len(more)} more"), _bars(more, group["rows"])) if more else None
    against = ["the trial ", tag("q", names[group["base"]])] if group["base"] is not None else "the model in float"
    words = tag("p", "Differences to ", against, ", window by window.", class_="quiet")
    return tag(
        "div", tag("h3", _capital(group["title"])), words, few, folded, tag("div", maps, class_="maps"), class_="group"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _bars(rows: Sequence[Mapping[str, Any]], every: Sequence[Mapping[str, Any]]) -> Markup:
    """A bar for each site; all bars share one scale, which includes 0."""
    ends = [end for row in every for end in _ends(row)]
    low = min(0.0, *ends)
    width = max(0.0, *ends) - low or 1.0
    words = {"Site": None, "ΔNLL": "number", "": None, "Interval": None}
    head = tag("tr", [tag("th", word, scope="col", class_=kind) for word, kind in words.items()])
    body = [_bar(row, low, width) for row in rows]
    return tag("table", tag("thead", head), tag("tbody", body), class_="bars")


def _bar(row: Mapping[str, Any], low: float, width: float) -> Markup:
    place = lambda x: f"{100 * (x - low) / width:.2f}%"
    ends = sorted((0.0, row["delta_nll"]))
    kind = "bar good" if row["delta_nll"] < 0 else "bar"
    bar = tag("i", class_=kind, style=f"left:{place(ends[0])};right:calc(100% - {place(ends[1])})")
    first, last = _ends(row)
    whisker = f"left:{place(first)};right:calc(100% - {place(last)})"
    cell = tag("td", tag("div", bar, tag("i", class_="whisker", style=whisker), class_="track"), class_="wide")
    number = tag("td", nats(row["delta_nll"]), class_="number")
    return tag(
        "tr",
        tag("th", site_button(row["site"]) if row["is_site"] else row["site"], scope="row"),
        number,
        cell,
        _range(row),
    )


def _ends(row: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of a row's interval; its loss twice where it has no interval."""
    if row["delta_low"] is None:
        return row["delta_nll"], row["delta_nll"]
    return row["delta_low"], row["delta_high"]


def _range(row: Mapping[str, Any]) -> Markup:
    return tag("td", interval(row["delta_low"], row["delta_high"]), class_="interval quiet")


def site_button(name: str) -> Markup:
    """A site's name as a button that opens the site's details."""
    return tag("button", name, type="button", class_="link", data_site=name)


# ---------------------------------------------------------------- heat maps


def _map(rows: Sequence[Mapping[str, Any]], key: str) -> Markup:
    """A heat map with components in rows and layers in columns."""
    layers = sorted({-1 if row["layer"] is None else row["layer"] for row in rows})
    largest = max(abs(row[key]) for row in rows) or 1.0
    power, unit = _unit(largest)
    found = {(row["component"], -1 if row["layer"] is None else row["layer"]): row for row in rows}
    names = sorted(
        {row["component"] for row in rows}, key=lambda name: -max(found[k][key] for k in found if k[0] == name)
    )
    cells = [[_cell(found.get((name, layer)), key, largest, power) for layer in layers] for name in names]
    heading = MEASURES[key].heading
    columns = [NONE if layer < 0 else f"L{layer}" for layer in layers]
    return heat_table(f"{heading} by site and layer{unit}", columns, names, cells)


def _unit(largest: float) -> tuple[float, str]:
    """The power of ten that the cells' numbers are multiplied with, and the words for it in a caption."""
    for power, words in ((1, ""), (1e3, ", in thousandths"), (1e6, ", in millionths")):
        if largest * power >= 1:
            return power, words
    return 1e6, ", in millionths"


def _cell(row: Mapping[str, Any] | None, key: str, largest: float, power: float) -> Markup:
    if row is None:
        return tag("td")
    value = row[key]
    heat = math.copysign(math.sqrt(abs(value) / largest), value)  # small differences can be seen beside large ones
    return _button(row["site"], heat, short(value * power), f"{row['site']}: {MEASURES[key].to_text(value)}")


def short(x: float) -> str:
    """Few digits, for a small cell."""
    text = f"{x:.0f}" if abs(x) >= 9.95 else f"{x:.1f}"
    return text.replace("-0.0", "0.0").replace("-", MINUS)


def _button(site: str, heat: float, text: str, title: str) -> Markup:
    """A cell that opens its site's details. heat: from -1 (good) to 1 (bad)."""
    kind = "heat good" if heat < 0 else "heat"
    style = f"--heat:{abs(heat):.3f}"
    inside = tag("button", text, type="button", class_=kind, style=style, data_site=site, title=title, aria_label=title)
    return tag("td", inside)


def heat_table(caption: str, columns: Sequence[str], names: Sequence[str], cells: Sequence[Sequence[Markup]]) -> Markup:
    """A heat map; the page's script moves the focus in it by arrow keys."""
    head = tag("tr", tag("td"), [tag("th", name, scope="col") for name in columns])
    body = [tag("tr", tag("th", name, scope="row"), row) for name, row in zip(names, cells, strict=True)]
    kind = "heats many" if len(columns) > NARROW_COLUMNS else "heats"
    table = tag("table", tag("thead", head), tag("tbody", body), class_=kind, aria_label=caption)
    return tag("figure", tag("figcaption", caption), tag("div", table, class_="scroll-x"))


# ---------------------------------------------------------------- heads


def heads_section(data: Mapping[str, Any]) -> Markup | None:
    """Signal to noise of every head that has a grid of its own: a heat map for each component and grid."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in by_head(data["sites"]):
        groups.setdefault((data["sites"][row["site"]]["component"], row["spec"]), []).append(row)
    if not groups:
        return None
    words = (
        "Signal to quantization noise in dB of every head that has a grid of its own; the colour is stronger the lower."
    )
    return joined(
        [
            tag("p", words, class_="quiet"),
            tag("div", [_heads(*of, rows) for of, rows in groups.items()], class_="maps heads"),
        ]
    )


def _heads(component: str, spec: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """A heat map with layers in rows and heads in columns."""
    values = [x for row in rows for x in row["sqnr"] if x is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    heat = lambda x: (high - x) / max(high - low, LEAST_SPREAD)
    cells = [
        [
            _button(row["site"], heat(x), f"{x:.0f}", f"{row['site']}, head {head}: {decibels(x)}")
            if x is not None
            else tag("td", NONE)
            for head, x in enumerate(row["sqnr"])
        ]
        for row in rows
    ]
    columns = [str(head) for head in range(max(len(row["sqnr"]) for row in rows))]
    names = [_layer(row["site"]) for row in rows]
    return heat_table(f"{component} on {spec}", columns, names, cells)


def _layer(site: str) -> str:
    found = re.match(r"L\d+(?=\.)", site)
    return found[0] if found else site
