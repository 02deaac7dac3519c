"""Parity of the twins, the work that was done, and where the results come from: the last parts of a report's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.study.report.markup import NONE, Markup, joined, nats, percent, plain, tag, whole_number

WORK = {
    "calibration_forwards": "forward passes of calibration",
    "forwards": "forward passes of trials",
    "layers_run": "layers run",
    "layers_saved": "layers saved, because an earlier trial had the same before them",
}


def confirm_section(data: Mapping[str, Any]) -> Markup | None:
    """Whether both twins have the same bits; ranks on the fast and on the confirmed path; float against integer."""
    if not data["confirmed"]:
        return None
    names = {trial["id"]: trial["name"] for trial in data["trials"]}
    heads = ("Trial", "prefill = prefill_reference", "ΔNLL on prefill", "Fast rank", "Confirmed rank")
    rows = [_confirmed(row, names[row["id"]]) for row in data["confirmed"]]
    table = tag("table", tag("thead", tag("tr", [tag("th", h, scope="col") for h in heads])), tag("tbody", rows))
    return joined([tag("div", table, class_="scroll-x"), _disagreement(data, names)])


def _confirmed(row: Mapping[str, Any], name: str) -> Markup:
    fast, slow = row.get("fast_rank"), row.get("confirmed_rank")
    parity, metrics = row["parity"], row.get("metrics") or {}
    button = tag("button", name, type="button", class_="link", data_trial=row["id"])
    cells = [nats(metrics.get("delta_nll")), *(NONE if rank is None else str(rank) for rank in (fast, slow))]
    said = tag("td", parity_words(parity, row.get("tokens")), class_="same" if parity["equal"] else "differs")
    moved = "moved" if fast != slow else None
    return tag("tr", tag("td", button), said, [tag("td", cell, class_="number") for cell in cells], class_=moved)


def parity_words(parity: Mapping[str, Any], tokens: int | None) -> str:
    """Whether the twins have the same bits, in words."""
    if parity["equal"]:
        return "equal to the bit" + (f" in {whole_number(tokens)} tokens" if tokens else "")
    # nine digits tell any two float32 apart
    exact = lambda value: f"{value:.9g}" if isinstance(value, float) else _value_text(value)
    first = ", ".join(f"{key} {exact(value)}" for key, value in (parity.get("first") or {}).items())
    return f"first difference: {first}" if first else "not equal"


def _disagreement(data: Mapping[str, Any], names: Mapping[Any, str]) -> Markup | None:
    """In how many codes float and integer arithmetic differ, by site."""
    found = [row for row in data["confirmed"] if row.get("disagreement")]
    if not found:
        return None
    made: list[Any] = [tag("h3", "Numbers that integer arithmetic gives another code than float")]
    for row in found:
        sites = sorted(row["disagreement"].items(), key=lambda item: -_share(item[1]))
        made.append(tag("p", names[row["id"]]))
        made.append(tag("dl", [_different(site, pair) for site, pair in sites], class_="figures small"))
    return joined(made)


def _different(site: str, pair: list[int]) -> Markup:
    button = tag("button", site, type="button", class_="link", data_site=site)
    share = tag("dd", percent(_share(pair), 3), tag("small", f"of {whole_number(pair[1])}"))
    return tag("div", tag("dt", button), share)


def _share(pair: list[int]) -> float:
    return pair[0] / pair[1] if pair[1] else 0.0


# ---------------------------------------------------------------- work and origin


def work_section(data: Mapping[str, Any]) -> Markup | None:
    """Forward passes and layers."""
    work = data["work"]
    facts = [(word, whole_number(work[key])) for key, word in WORK.items() if key in work]
    if "layers_run" in work and "layers_saved" in work:
        every = work["layers_run"] + work["layers_saved"]
        facts.append(("of all layers saved", percent(work["layers_saved"] / every if every else None, 1)))
    return facts_list(facts) if facts else None


def origin_section(data: Mapping[str, Any]) -> Markup:
    """Hashes, seeds, versions: everything else that study.json says."""
    facts: list[tuple[str, str]] = [("model", data["model"]["name"]), ("model's content", data["model"]["hash"])]
    for key, value in data["provenance"].items():
        facts += _flat(key.replace("_", " "), value)
    facts.append(("seeds", "none: nothing in a study is random"))
    recipe = (
        tag("details", tag("summary", "The study's recipe"), tag("pre", data["recipe"])) if data["recipe"] else None
    )
    return joined([facts_list(facts), recipe])


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """A value as facts; values in nested tables get the names of all tables they are in."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [fact for key, inner in value.items() for fact in _flat(f"{name} {key.replace('_', ' ')}", inner)]
    if isinstance(value, list) and any(isinstance(x, (Mapping, list)) for x in value):
        return [
            fact for i, inner in enumerate(value, 1) for fact in _flat(f"{name} {i}" if len(value) > 1 else name, inner)
        ]
    if isinstance(value, list):
        return [(name, ", ".join(map(_value_text, value)))]
    return [(name, _value_text(value))]


def _value_text(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {True: "yes", False: "no", None: NONE}.get(value, str(value))
    return whole_number(value) if isinstance(value, int) else plain(value, 6)


def facts_list(facts: list[tuple[str, str]]) -> Markup:
    """Names and values."""
    return tag("dl", [joined([tag("dt", name), tag("dd", text)]) for name, text in facts], class_="facts")


def winner_section(data: Mapping[str, Any]) -> Markup | None:
    """The winner, ready to be copied."""
    if data["winner_recipe"] is None:
        return None
    button = tag("button", "Copy", type="button", id="copy", data_scripted=True, hidden=True)
    return tag("div", tag("pre", data["winner_recipe"], id="winner", tabindex="0"), button, class_="copied")
