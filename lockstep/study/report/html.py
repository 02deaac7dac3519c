"""A report's data as one HTML page, which loads nothing from anywhere else.

Verdict, trials, heat maps, parity and origin are HTML, and can be read without a script. The plot, and the details of a
site or a trial that the reader clicks on, are drawn by the page's script from data in the page.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from lockstep.study.records import TRIALS
from lockstep.study.report.heat import heads_section, sensitivity_section
from lockstep.study.report.markup import (
    NONE,
    Markup,
    Metric,
    byte_size,
    counted,
    decibels,
    divergence,
    interval,
    joined,
    nats,
    percent,
    plain,
    rough_percent,
    script_json,
    signed,
    spread,
    tag,
    whole_number,
)
from lockstep.study.report.origin import confirm_section, origin_section, winner_section, work_section
from lockstep.study.report.weights import weights_section

PAGE = "lockstep.study.report"
SCRIPTS = ("dom.js", "plot.js", "detail.js", "tables.js", "app.js")  # in this order, as one module
MOST_NAMES = 4  # trials that the verdict names
MOST_FLOATS = 12  # layers that are named because they stay in floats under a plan in integers
METRICS = {
    "delta_nll": Metric("ΔNLL", nats),
    "kl_mean": Metric("KL, mean", divergence),
    "kl_p99": Metric("KL, p99", divergence),
    "top1": Metric("same top-1", percent),
    "weight_bytes": Metric("weights", byte_size),
    "bits_per_weight": Metric("bits a weight", plain),
    "kv_bytes": Metric("KV per token", byte_size),
    "ppl": Metric("perplexity", plain),
    "kl_max": Metric("KL, largest", divergence),
    "delta_p": Metric("Δp", signed),
}
COLUMNS = ("delta_nll", "kl_mean", "kl_p99", "top1", "weight_bytes", "kv_bytes")  # of trials; also shown of the winner
FIGURES = {  # of a grid
    "sqnr": Metric("SQNR", decibels),
    "saturation": Metric("saturated", percent),
    "code_use": Metric("codes used", rough_percent),
}


def page(data: Mapping[str, Any]) -> str:
    """The whole document."""
    script = "\n".join(_static(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fields = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": tag("title", f"{data['model']['name']}: quantization study"),
        "style": Markup(_static("report.css")),
        "script": Markup(script),
        "data": script_json(page_data(data)),
        "body": body(data),
    }
    made = _static("report.html")
    for name in (
        "policy",
        "title",
        "style",
        "script",
        "data",
        "body",
    ):  # the body last: it contains texts from the study
        made = made.replace(f"<!-- {name} -->", fields[name], 1)
    return made


def _static(name: str) -> str:
    return resources.files(PAGE).joinpath("page", name).read_text("utf-8")


def body(data: Mapping[str, Any]) -> Markup:
    """Everything that the reader sees, the most important section first."""
    parts = {
        "verdict": ("Verdict", verdict_section(data)),
        "bytes": ("Accuracy against bytes", plot_section(data)),
        "trials": ("Trials", trials_section(data)),
        "sensitivity": ("Sensitivity", sensitivity_section(data)),
        "heads": ("Heads", heads_section(data)),
        "weights": ("Weights", weights_section(data)),
        "confirm": ("Confirmation", confirm_section(data)),
        "work": ("Work", work_section(data)),
        "origin": ("Origin", origin_section(data)),
        "recipe": ("Winner as a recipe", winner_section(data)),
    }
    filled = {name: section for name, section in parts.items() if section[1] is not None}
    links = [tag("a", title, href=f"#{name}") for name, (title, _) in filled.items()]
    head = tag("header", tag("h1", data["model"]["name"], " ", tag("span", "quantization study", class_="quiet")))
    sections = [
        tag("section", tag("h2", title), content, id=name, tabindex="-1") for name, (title, content) in filled.items()
    ]
    return joined([head, tag("nav", links, aria_label="Sections"), tag("main", sections)])


# ---------------------------------------------------------------- verdict


def verdict_section(data: Mapping[str, Any]) -> Markup:
    verdict, names = data["verdict"], {trial["id"]: trial["name"] for trial in data["trials"]}
    if verdict["winner"] is None:
        return tag("p", f"No trial is done yet: {_statuses(data)}.", class_="big")
    where = "confirmed on prefill" if verdict["is_confirmed"] else "not confirmed on prefill"
    metrics = verdict["metrics"]
    figures = [_figure(key, metrics) for key in COLUMNS if metrics.get(key) is not None]
    return joined(
        [
            tag("p", tag("b", names[verdict["winner"]]), class_="big"),
            tag("p", _noise(verdict, names)),
            tag("dl", figures, class_="figures"),
            tag("p", f"Best of {_statuses(data)}, {where}.", _baseline(data), class_="quiet"),
        ]
    )


def _figure(key: str, metrics: Mapping[str, Any]) -> Markup:
    metric = METRICS[key]
    more = interval(metrics.get("delta_low"), metrics.get("delta_high")) if key == "delta_nll" else None
    if key == "weight_bytes" and metrics.get("bits_per_weight") is not None:
        more = f"{plain(metrics['bits_per_weight'], 3)} bits a weight"
    return tag("div", tag("dt", metric.heading), tag("dd", metric.to_text(metrics[key]), more and tag("small", more)))


def _noise(verdict: Mapping[str, Any], names: Mapping[Any, str]) -> Markup:
    """Which differences are within noise, by the intervals of losses."""
    if not verdict["has_interval"]:
        return Markup("Its loss has no interval, which takes two windows or more: what is noise cannot be told.")
    if verdict["like_float"]:
        first = "Within noise of the model in float: the interval of its loss holds 0."
    else:
        first = "It differs from the model in float by more than noise."
    like = [names[id] for id in verdict["like"]]
    if not like:
        return joined([first, _next(verdict, names)])
    more = f" and {counted(len(like) - MOST_NAMES, 'other')}" if len(like) > MOST_NAMES else ""
    listed = [[", " if i else "", tag("q", name)] for i, name in enumerate(like[:MOST_NAMES])]
    why = ". Window by window, the difference has an interval that holds 0."
    return joined([first, " As good within noise: ", listed, more, why])


def _next(verdict: Mapping[str, Any], names: Mapping[Any, str]) -> Markup | None:
    """How much more the second best trial loses than the winner."""
    other = verdict["next"]
    if other is None:
        return None
    more = f", loses {nats(other['mean']).lstrip('+')} more {interval(other['low'], other['high'])}."
    return joined([" No other trial is as good: the next, ", tag("q", names[other["id"]]), more])


def _statuses(data: Mapping[str, Any]) -> str:
    work = data["work"]
    rest = [f"{whole_number(work[s])} {s}" for s in ("stopped", "failed") if work[s]]
    rest += [f"{whole_number(work['to_come'])} to come"] if "to_come" in work else []
    return ", ".join([f"{counted(work['done'], 'trial')} done", *rest])


def _baseline(data: Mapping[str, Any]) -> str:
    base = data["baseline"]
    if base is None:
        return ""
    ppl = f", perplexity {plain(base['perplexity'])}" if base.get("perplexity") is not None else ""
    ppl += f" ± {plain(base['perplexity_error'], 2)}" if ppl and base.get("perplexity_error") is not None else ""
    tokens = f", {whole_number(base['tokens'])} tokens" if base.get("tokens") is not None else ""
    return f" The model in float: NLL {plain(base['nll'], 5)}{ppl}{tokens}."


# ---------------------------------------------------------------- trials


def plot_section(data: Mapping[str, Any]) -> Markup | None:
    """An empty element in which the script draws the plot, and the frontier as a list."""
    frontiers = {key: ids for key, ids in data["frontiers"].items() if ids}
    if not frontiers:
        return None
    errors = list(dict.fromkeys(key.split("/")[0] for key in frontiers))
    sizes = list(dict.fromkeys(key.split("/")[1] for key in frontiers))
    choose = [_select("plot-error", "Loss", errors), _select("plot-size", "Bytes", sizes)]
    return joined(
        [
            tag("div", choose, class_="controls", data_scripted=True, hidden=True),
            tag("div", id="plot", class_="plot"),
            tag("p", "On the frontier, the smallest first:", id="frontier-title"),
            tag("ol", _frontier(data, next(iter(frontiers))), id="frontier", aria_labelledby="frontier-title"),
        ]
    )


def _select(name: str, word: str, keys: list[str]) -> Markup:
    options = [tag("option", METRICS[key].heading, value=key) for key in keys]
    return tag("label", word, " ", tag("select", options, id=name))


def _frontier(data: Mapping[str, Any], key: str) -> list[Markup]:
    names = {trial["id"]: trial["name"] for trial in data["trials"]}
    return [tag("li", names[id]) for id in data["frontiers"][key]]


def trials_section(data: Mapping[str, Any]) -> Markup | None:
    """All trials, the best first; those that are not done at the end."""
    if not data["trials"]:
        return None
    places = {id: place for place, id in enumerate(data["ranking"], 1)}
    rows = sorted(data["trials"], key=lambda trial: places.get(trial["id"], len(places) + 1))
    keys = [key for key in COLUMNS if any(trial["metrics"].get(key) is not None for trial in rows)]
    heads = ["#", "Trial", *(METRICS[key].heading for key in keys), "Windows"]
    if "delta_nll" in keys:
        heads.insert(3, "Interval")
    body = [_trial_row(trial, places.get(trial["id"]), keys, data["verdict"]["winner"]) for trial in rows]
    table = tag("table", tag("thead", tag("tr", map(_head, heads))), tag("tbody", body), class_="sortable")
    torn = [tag("p", torn_words(name)) for name in data["torn"]]
    label = "Table of trials"
    return joined([tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=label), torn])


def torn_words(name: str) -> str:
    """The sentence about a file whose last line was cut short."""
    command = "run" if name == TRIALS else "confirm"
    return f"The last line of {name} is cut short, and left out: lockstep ptq {command} makes it again."


def _head(word: str) -> Markup:
    return tag("th", word, scope="col", class_=None if word in ("Trial", "Interval") else "number")


def _trial_row(trial: Mapping[str, Any], place: int | None, keys: list[str], winner: Any) -> Markup:
    metrics = trial["metrics"]
    cells = [_number(METRICS[key].to_text(metrics.get(key)), metrics.get(key)) for key in keys]
    if "delta_nll" in keys:
        cells.insert(1, tag("td", interval(metrics.get("delta_low"), metrics.get("delta_high")), class_="interval"))
    status = None if trial["status"] == "done" else tag("small", trial["status"], class_="status")
    name = tag("td", tag("button", trial["name"], type="button", class_="link", data_trial=trial["id"]), status)
    first, last = _number(str(place or ""), place), _number(whole_number(trial.get("windows")), trial.get("windows"))
    return tag("tr", first, name, cells, last, class_="winner" if trial["id"] == winner else trial["status"])


def _number(text: str, value: Any) -> Markup:
    return tag("td", text, class_="number", data_value=value)


# ---------------------------------------------------------------- what the script draws


def page_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Trials with their facts in words, sites with their ranges and grids, frontiers."""
    return dict(
        winner=data["verdict"]["winner"],
        frontiers=data["frontiers"],
        words={key: metric.heading for key, metric in METRICS.items()},
        trials=[_trial_facts(trial) for trial in data["trials"]],
        sites={name: _site_facts(site) for name, site in data["sites"].items()},
    )


def _trial_facts(trial: Mapping[str, Any]) -> dict[str, Any]:
    metrics = trial["metrics"]
    there = {key: metric for key, metric in METRICS.items() if metrics.get(key) is not None}
    facts = [[metric.heading, metric.to_text(metrics[key])] for key, metric in there.items()]
    if metrics.get("delta_low") is not None:
        facts.insert(1, ["interval", interval(metrics["delta_low"], metrics.get("delta_high"))])
    words = dict(windows="windows", layers_run="layers run", layers_saved="layers saved", reason="reason")
    facts += [[word, _value_text(trial[key])] for key, word in words.items() if key in trial]
    facts += [["plan", trial["plan_hash"][:12]], *_arithmetic_facts(trial.get("integer"))]
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    kept = dict(id=trial["id"], name=trial["name"], status=trial["status"], plan=trial["plan_text"])
    kept["words"] = {key: metric.to_text(metrics[key]) for key, metric in there.items()}
    return kept | dict(metrics=numbers, facts=facts)


def _arithmetic_facts(integer: Mapping[str, Any] | None) -> list[list[str]]:
    """How many linear layers multiply integers under a plan in integers, and why the others do not."""
    if integer is None:
        return []
    floats = [["in floats", f"{site}: {why}"] for site, why in list(integer["floats"].items())[:MOST_FLOATS]]
    rest = len(integer["floats"]) - len(floats)
    more = [["in floats", f"and {counted(rest, 'other')}"]] if rest else []
    return [["layers in integers", whole_number(integer["layers"])], *floats, *more]


def _value_text(value: Any) -> str:
    return whole_number(value) if isinstance(value, int) else str(value)


def _site_facts(site: Mapping[str, Any]) -> dict[str, Any]:
    kind = "weight" if site.get("is_weight") else "activation, inside an op" if site.get("is_inner") else "activation"
    facts = [["kind", kind], ["heads", str(site.get("heads", 1))]]
    facts += [["width", str(site["width"])]] if site.get("width") else []
    facts += [["range", f"{plain(site['min'])} … {plain(site['max'])}"]] if "min" in site and "max" in site else []
    heads = ["grid", *(figure.heading for figure in FIGURES.values())]
    grids = [_grid_facts(grid) for grid in site["grids"]]
    every = ["head", "scale", "zero", *heads[1:]]
    return dict(facts=facts, histogram=site.get("histogram"), heads=heads, every=every, grids=grids)


def _grid_facts(grid: Mapping[str, Any]) -> dict[str, Any]:
    """How well a grid fits: over all heads, and for each head where heads have grids of their own."""
    row = [grid["spec"], *(spread(grid.get(key), figure.to_text) for key, figure in FIGURES.items())]
    more = [f"{key} {spread(grid[key], plain)}" for key in ("scale", "zero") if key in grid]
    more += [f"reaches {plain(grid['reach'][0])} … {plain(grid['reach'][1])}"] if grid.get("reach") else []
    lists = [grid.get(key) for key in ("scale", "zero", *FIGURES)]
    writers = [plain, plain, *(figure.to_text for figure in FIGURES.values())]
    num_heads = max((len(values) for values in lists if isinstance(values, list)), default=1)
    cells = lambda head: [
        to_text(values[head]) if isinstance(values, list) and head < len(values) else NONE
        for values, to_text in zip(lists, writers, strict=True)
    ]
    by_head = [[str(head), *cells(head)] for head in range(num_heads)] if num_heads > 1 else []
    return dict(row=row, more=", ".join(more), by_head=by_head)
