"""What a study's trials tell about single sites: how much rounding each site costs, and how well its grids fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.ptq.spec import Spec
from lockstep.study.records import STUDY, TRIALS
from lockstep.study.report.folder import optional
from lockstep.study.report.pairs import difference, from_float

FIGURES = ("spec", "scale", "zero", "saturation", "code_use", "sqnr")
SITE = ("heads", "width", "layer", "is_weight", "is_inner")
BY_HEAD = "/head"


def component(name: str, layer: int | None) -> str:
    """A site's name without its layer: "q" of L3.q."""
    return name.removeprefix(f"L{layer}.") if layer is not None else name


# ---------------------------------------------------------------- sensitivity


def sensitivity(trials: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of trials whose plans differ in the site of their last rule only, with the cost of each such rule.

    A group has a title; spared: whether its rules leave a site unrounded while the other sites are rounded; base: the
    trial without the last rule (None: the model in float); rows: one for each rule, the one that matters most first. A
    row has the difference to the base, delta_nll with its interval and kl_mean. The row's site is that of the rule; if
    this is a glob, is_site is False, and layer and component are None.
    """
    known = {site["name"]: site.get("layer") for site in sites}
    done = {_key(t["plan"], t["plan"]["rules"]): t for t in trials if t["status"] == "done"}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for trial in done.values():
        rules = trial["plan"]["rules"]
        if rules:
            groups.setdefault((_key(trial["plan"], rules[:-1]), rules[-1][1]), []).append(trial)
    found = ((rest, spec, group) for (rest, spec), group in groups.items() if len(group) > 1)
    return [_group(json.loads(rest), spec, group, done.get(rest), known) for rest, spec, group in found]


def _key(plan: Mapping[str, Any], rules: Sequence[Any]) -> str:
    """A plan with its rules replaced by `rules`, as text that can be compared."""
    return json.dumps(dict(plan, rules=rules), sort_keys=True)


def _group(
    rest: Mapping[str, Any], spec: str, trials: Sequence[Mapping[str, Any]], base: Any, known: Mapping[str, Any]
) -> dict[str, Any]:
    others, spared = ", ".join(f"{glob} {other}" for glob, other in rest["rules"]), spec == "off"
    title = "each alone not rounded" if spared else f"each alone on {spec}"
    rows = [_row(trial, base, known) for trial in trials]
    return dict(
        title=f"{title}, beside {others}" if others else title,
        spared=spared,
        base=base and base["id"],
        rows=sorted(rows, key=lambda row: row["delta_nll"] if spared else -row["delta_nll"]),
    )


def _row(trial: Mapping[str, Any], base: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    site = trial["plan"]["rules"][-1][0]
    loss, kl = from_float(trial) if base is None else difference(trial, base), trial["metrics"].get("kl_mean")
    if base is not None and kl is not None:
        before = base["metrics"].get("kl_mean")
        kl = None if before is None else kl - before
    is_site, layer = site in known, known.get(site)
    where = dict(site=site, is_site=is_site, layer=layer, component=component(site, layer) if is_site else None)
    return dict(where, trial=trial["id"], delta_nll=loss.mean, delta_low=loss.low, delta_high=loss.high, kl_mean=kl)


# ---------------------------------------------------------------- sites


def sites_table(
    study: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], folder: str
) -> dict[str, dict[str, Any]]:
    """{site: its kind and place, the range and histogram that calibration saw, and how well each tried grid fits}."""
    stats = optional(study, "stats", dict, f"{folder}: {STUDY}") or {}
    made = {site["name"]: _site(site, stats.get(site["name"]), folder) for site in study["sites"]}
    for trial in trials:
        where = f"{folder}: {TRIALS}: trial {trial['id']!r}"
        for name, figures in (optional(trial, "sites", dict, where) or {}).items():
            if name not in made:
                raise ValueError(f"{where}: sites has {name!r:.80}, and {STUDY} has no such site")
            _add(made[name]["grids"], figures, f"{where}: site {name}")
    return made


def _site(site: Mapping[str, Any], stat: Any, folder: str) -> dict[str, Any]:
    made = {key: site[key] for key in SITE if key in site}
    made["component"] = component(site["name"], site.get("layer"))
    where = f"{folder}: {STUDY}: stats of {site['name']}"
    if stat is not None:
        stat = dict(stat)
        made |= {key: stat[key] for key in ("min", "max") if stat.get(key) is not None}
        made |= dict(histogram=_histogram(stat["histogram"], where)) if stat.get("histogram") else {}
    return made | dict(grids=[])


def _histogram(found: Any, where: str) -> dict[str, Any]:
    """The histogram, checked: {edges [n + 1], counts [n]}."""
    edges, counts = (found.get("edges"), found.get("counts")) if isinstance(found, Mapping) else (None, None)
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1:
        raise ValueError(f"{where}: histogram is {found!r:.80}, expected counts, and edges of which there is one more")
    return dict(edges=edges, counts=counts)


def _add(grids: list[dict[str, Any]], figures: Any, where: str) -> None:
    """Adds a trial's figures of a site. Equal figures are kept once, since all trials share one calibration."""
    if not isinstance(figures, Mapping) or not isinstance(figures.get("spec"), str):
        raise ValueError(f"{where}: {figures!r:.80}, expected figures with a spec")
    kept = {key: figures[key] for key in FIGURES if figures.get(key) is not None}
    for known in grids:
        if {key: known[key] for key in FIGURES if key in known} == kept:
            known["trials"] += 1
            return
    try:
        reach = _reach(kept)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    grids.append(kept | dict(trials=1) | (dict(reach=reach) if reach else {}))


def _reach(figures: Mapping[str, Any]) -> list[float] | None:
    """The lowest and the highest value of an integer grid, over all heads; None for grids without a stored scale."""
    grid, scale, zero = Spec.parse(figures["spec"]).what, figures.get("scale"), figures.get("zero")
    if not grid.is_integer or scale is None or zero is None:
        return None
    as_list = lambda x: x if isinstance(x, list) else [x]
    pairs = list(zip(as_list(scale), as_list(zero), strict=True))
    return [min((grid.low - z) * s for s, z in pairs), max((grid.high - z) * s for s, z in pairs)]


def by_head(sites: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sites with a grid for each head: site, spec, and the signal to noise of every head."""
    return [
        dict(site=name, spec=grid["spec"], sqnr=grid["sqnr"])
        for name, site in sites.items()
        for grid in site["grids"]
        if BY_HEAD in grid["spec"] and isinstance(grid.get("sqnr"), list)
    ]


def by_weight(sites: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of site, spec, sqnr and number of trials for every weight and tried grid, the noisiest first. A weight that
    its grid holds exactly has no noise and comes last."""
    rows = [
        dict(site=name, spec=grid["spec"], sqnr=grid["sqnr"][0], trials=grid["trials"])
        for name, site in sites.items()
        for grid in site["grids"]
        if site.get("is_weight") and isinstance(grid.get("sqnr"), list)
    ]
    return sorted(rows, key=lambda row: float("inf") if row["sqnr"] is None else row["sqnr"])
