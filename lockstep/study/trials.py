"""The trials of a study: its base plan, and the plans that its sweeps make of it."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import Treatment
from lockstep.ptq.site import Site
from lockstep.ptq.spec import Spec
from lockstep.ptq.treatment import sites_for
from lockstep.study.recipe import ARITHMETIC, ONE_AT_A_TIME, Sweep
from lockstep.study.scoring.formats import check_formats
from lockstep.study.scoring.subject import Subject, treatment_for
from lockstep.study.scoring.text import Window, windows_hash

BASE = "base"
ID_DIGITS = 16

MAX_TRIALS = 10_000  # of a sweep


@dataclass(frozen=True)
class Trial:
    """A plan to try. swept: {name: value} of what its sweep varied. may_stop: whether the trial is stopped early if it
    is clearly worse than the best. id: a hash of plan, model and windows."""

    name: str
    swept: Mapping[str, str]
    plan: Plan
    may_stop: bool = False
    id: str = ""


@dataclass(frozen=True)
class Study:
    """Everything that a study's results depend on; it can be sent to another process.

    model: a name as in `load_subject`; content: the hash of the model's files. trials: the base plan comes first.
    calibration: token ids of its windows. round: after how many windows trials are compared. by_token: how standard
    errors are estimated, see `figures.text_figures`.
    """

    model: str
    weights: str
    content: str
    sites: tuple[Site, ...]
    treatment: Treatment
    trials: tuple[Trial, ...]
    calibration: tuple[tuple[int, ...], ...]
    evaluation: tuple[Window, ...]
    round: int
    by_token: bool = False
    texts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The tokens of the longest window that is evaluated."""
        return max(len(window.ids) for window in self.evaluation)

    @property
    def model_name(self) -> str:
        """The model's name in files and reports: of a folder or file its last part, not its place on this machine."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model

    def rounds(self) -> list[range]:
        """The indices of the windows of each round."""
        return [range(i, min(i + self.round, len(self.evaluation))) for i in range(0, len(self.evaluation), self.round)]


def make_study(
    subject: Subject,
    plan: Plan,
    sweeps: Sequence[Sweep],
    calibration: Sequence[Sequence[int]],
    evaluation: Sequence[Window],
    *,
    round: int = 8,
    early_stop: bool = True,
    by_token: bool = False,
    texts: Mapping[str, Any] | None = None,
) -> Study:
    """A study of a model on windows of token ids. ValueError, with the rule, for a plan that the model's sites do not
    allow."""
    program = subject.model.recorded
    sites = sites_for(program, plan)
    trials = expand(plan, sweeps, sites, early_stop)
    specs = [trial.plan.resolve(sites) for trial in trials]
    check_formats(program, specs)
    longest = max(len(ids) for ids in (*calibration, *(window.ids for window in evaluation)))
    treatment = treatment_for(program, plan, specs, longest)
    about = [subject.content, subject.model.weights, [list(ids) for ids in calibration], windows_hash(evaluation)]
    return Study(
        model=subject.name,
        weights=subject.model.weights,
        content=subject.content,
        sites=tuple(sites),
        treatment=treatment,
        trials=tuple(_with_id(trial, treatment.inside, about) for trial in trials),
        calibration=tuple(map(tuple, calibration)),
        evaluation=tuple(evaluation),
        round=round,
        by_token=by_token,
        texts=texts or {},
    )


def _with_id(trial: Trial, inside: Sequence[str], about: Sequence[Any]) -> Trial:
    """The trial with its id. Its plan names all that the study takes apart, so that it has the same bits outside."""
    plan = replace(trial.plan, apart=inside)
    digest = hashlib.sha256(json.dumps([plan.hash, *about]).encode()).hexdigest()
    return replace(trial, plan=plan, id=digest[:ID_DIGITS])


# ------------------------------------------------------------ sweeps


def expand(plan: Plan, sweeps: Sequence[Sweep], sites: Sequence[Site], early_stop: bool = True) -> list[Trial]:
    """The base plan and the plans that sweeps make of it, in order. Among plans that round alike the first is kept.

    Trials of products may be stopped early. Trials that change one site may not: each is to show how much its site
    matters. ValueError for a glob without sites, and for grids that a site cannot have.
    """
    made: dict[tuple[str | Spec, ...], Trial] = {}
    for trial in _all(plan, sweeps, sites, early_stop):
        made.setdefault((trial.plan.arithmetic, *trial.plan.resolve(sites).values()), trial)
    return list(made.values())


def _all(plan: Plan, sweeps: Sequence[Sweep], sites: Sequence[Site], early_stop: bool) -> Iterator[Trial]:
    yield Trial(BASE, {}, plan)
    for sweep in sweeps:
        num_trials = math.prod(len(specs) for _, specs in sweep.lists.values()) * max(1, len(sweep.arithmetic))
        if num_trials > MAX_TRIALS:
            names = ", ".join([*sweep.lists, *([ARITHMETIC] if sweep.arithmetic else [])])
            raise ValueError(f"sweep: {num_trials} combinations of {names}, expected at most {MAX_TRIALS}")
        if sweep.kind == "product":
            yield from _product(plan, sweep, early_stop)
        else:
            yield from _single(plan, sweep, sites)


def _product(plan: Plan, sweep: Sweep, early_stop: bool) -> Iterator[Trial]:
    axes = {name: specs for name, (_, specs) in sweep.lists.items()}
    axes |= {ARITHMETIC: sweep.arithmetic} if sweep.arithmetic else {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        rules = [(glob, chosen[name]) for name, (glob, _) in sweep.lists.items()]
        label = ", ".join(f"{name} {value}" for name, value in chosen.items())
        arithmetic = chosen.get(ARITHMETIC, plan.arithmetic)
        yield Trial(label, chosen, replace(plan, rules=[*plan.rules, *rules], arithmetic=arithmetic), early_stop)


def _single(plan: Plan, sweep: Sweep, sites: Sequence[Site]) -> Iterator[Trial]:
    """A trial for each site and grid: that site alone differs from the base plan."""
    [(glob, specs)] = sweep.lists.values()
    found = [site.name for site in sites if fnmatch.fnmatchcase(site.name, glob)]
    if not found:
        Plan([(glob, specs[0])]).resolve(sites)  # raises an error that names similar sites
    for spec, name in itertools.product(specs, found):
        label = f"{name} {spec}" if sweep.kind == ONE_AT_A_TIME else f"without {name}"
        label += f" ({spec})" if sweep.kind != ONE_AT_A_TIME and spec != "off" else ""
        yield Trial(label, dict(site=name, spec=spec), replace(plan, rules=[*plan.rules, (_literal(name), spec)]))


def _literal(name: str) -> str:
    """A glob that matches only this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
