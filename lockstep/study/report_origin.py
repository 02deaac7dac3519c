"""What was proved, what it took, and where it came from: the last parts of a report's page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.study.report_markup import NONE, Markup, count, joined, percent, plain, tag

WORK = {
    "calibration_forwards": "forward passes of calibration",
    "forwards": "forward passes of trials",
    "layers_run": "layers run",
    "layers_saved": "layers saved, because an earlier trial had the same before them",
}


def confirm_section(data: Mapping[str, Any]) -> Markup | None:
    """Whether both paths have the same bits; places on the fast and on the confirmed path; float against integer."""
    if not data["confirmed"]:
        return None
    names = {trial["id"]: trial["name"] for trial in data["trials"]}
    heads = ("Trial", "prefill = prefill_reference", "Fast rank", "Confirmed rank")
    rows = [_confirmed(row, names[row["id"]]) for row in data["confirmed"]]
    table = tag("table", tag("thead", tag("tr", [tag("th", h, scope="col") for h in heads])), tag("tbody", rows))
    return joined([tag("div", table, class_="scroll-x"), _disagreement(data, names)])


def _confirmed(row: Mapping[str, Any], name: str) -> Markup:
    fast, slow = row.get("fast_rank"), row.get("confirmed_rank")
    moved = None if fast == slow or None in (fast, slow) else "moved"
    words, kind = parity_words(row.get("parity"))
    button = tag("button", name, type="button", class_="link", data_trial=row["id"])
    ranks = [tag("td", NONE if rank is None else str(rank), class_="number") for rank in (fast, slow)]
    return tag("tr", tag("td", button), tag("td", words, class_=kind), ranks, class_=moved)


def parity_words(parity: Any) -> tuple[str, str | None]:
    """Whether the twins have the same bits, in words, and a class for its colour."""
    if parity is None:
        return "not compared", None
    if parity is True or parity == "equal" or (isinstance(parity, Mapping) and parity.get("equal") is True):
        return "equal to the bit", "same"
    first = parity.get("first", parity) if isinstance(parity, Mapping) else parity
    if isinstance(first, Mapping):
        first = ", ".join(f"{key} {value}" for key, value in first.items() if key != "equal")
    return f"first difference: {first}", "differs"


def _disagreement(data: Mapping[str, Any], names: Mapping[Any, str]) -> Markup | None:
    """In how many codes float and integer arithmetic differ, by site."""
    found = [row for row in data["confirmed"] if row.get("disagreement")]
    if not found:
        return None
    made: list[Any] = [tag("h3", "Codes in which float and integer arithmetic differ")]
    for row in found:
        shares = sorted(row["disagreement"].items(), key=lambda item: -item[1])
        cells = [
            tag(
                "div",
                tag("dt", tag("button", site, type="button", class_="link", data_site=site)),
                tag("dd", percent(x, 3)),
            )
            for site, x in shares
        ]
        made.append(tag("p", names[row["id"]]))
        made.append(tag("dl", cells, class_="figures small"))
    return joined(made)


# ---------------------------------------------------------------- work and origin


def work_section(data: Mapping[str, Any]) -> Markup | None:
    """Forward passes and layers."""
    work = data["work"]
    facts = [(word, count(work[key])) for key, word in WORK.items() if key in work]
    if "layers_run" in work and "layers_saved" in work:
        every = work["layers_run"] + work["layers_saved"]
        facts.append(("of all layers saved", percent(work["layers_saved"] / every if every else None, 1)))
    return facts_list(facts) if facts else None


def origin_section(data: Mapping[str, Any]) -> Markup:
    """Hashes, seeds, versions: everything else that study.json says."""
    facts: list[tuple[str, str]] = [("model", data["model"]["name"]), ("model's content", data["model"]["hash"])]
    for key, value in data["provenance"].items():
        facts += _flat(key.replace("_", " "), value)
    recipe = (
        tag("details", tag("summary", "The study's recipe"), tag("pre", data["recipe"])) if data["recipe"] else None
    )
    return joined([facts_list(facts), recipe])


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    """Tables in tables as names with dots between."""
    if isinstance(value, Mapping):
        return [fact for key, inner in value.items() for fact in _flat(f"{name} {key}", inner)]
    if isinstance(value, list) and any(isinstance(x, (Mapping, list)) for x in value):
        return [
            fact for i, inner in enumerate(value, 1) for fact in _flat(f"{name} {i}" if len(value) > 1 else name, inner)
        ]
    if isinstance(value, list):
        return [(name, ", ".join(map(_text, value)))]
    return [(name, _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return {True: "yes", False: "no", None: NONE}.get(value, str(value))
    return count(value) if isinstance(value, int) else plain(value, 6)


def facts_list(facts: list[tuple[str, str]]) -> Markup:
    """Names and values."""
    return tag("dl", [joined([tag("dt", name), tag("dd", text)]) for name, text in facts], class_="facts")


def winner_section(data: Mapping[str, Any]) -> Markup | None:
    """The winner, ready to be copied."""
    if data["winner_recipe"] is None:
        return None
    button = tag("button", "Copy", type="button", id="copy", data_scripted=True, hidden=True)
    return tag("div", tag("pre", data["winner_recipe"], id="winner", tabindex="0"), button, class_="copied")
