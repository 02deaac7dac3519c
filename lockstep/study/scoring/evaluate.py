"""Scores of one model, with or without a plan, on one text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.ptq.integer import INTEGER
from lockstep.ptq.observers import Stat
from lockstep.ptq.plan import Plan
from lockstep.ptq.rewrite import Treatment
from lockstep.ptq.solved import Solved
from lockstep.ptq.spec import Spec
from lockstep.ptq.treatment import sites_for
from lockstep.ptq.unroll import unroll
from lockstep.runtime.threads import Team
from lockstep.study.scoring.calibrate import calibrate
from lockstep.study.scoring.figures import compared_figures, text_figures, window_figures
from lockstep.study.scoring.rig import Rig
from lockstep.study.scoring.subject import Subject, treatment_for
from lockstep.study.scoring.text import Window

PREFILL, PREFILL_REFERENCE = TWINS = ("prefill", "prefill_reference")
OnWindow = Callable[[int, int], object]


def rig_for(subject: Subject, treatment: Treatment, team: Team, length: int, twin: str = PREFILL_REFERENCE) -> Rig:
    """The rig of a twin."""
    change = (lambda rounded: unroll(rounded.program)) if twin == PREFILL else None
    return Rig(subject.model, treatment, team, length, change)


@dataclass(frozen=True)
class Setup:
    """A plan that can be put on a rig. specs: by site. grids: of activations, by site, as float32 rows. arithmetic:
    "float" or "integer"."""

    specs: Mapping[str, Spec]
    grids: Mapping[str, np.ndarray]
    arithmetic: str = "float"

    def put_on(self, rig: Rig) -> None:
        """Sets grids, weights and arithmetic."""
        rig.set_grids(self.grids)
        rig.set_weights(self.specs, self.arithmetic)


FLOAT = Setup({}, {})  # nothing is rounded


def solve(
    subject: Subject,
    plan: Plan,
    team: Team,
    windows: Sequence[Window],
    on_window: OnWindow | None = None,
) -> Solved:
    """The plan with its grids, from one pass over calibration windows unless the plan needs no ranges. ValueError if
    grids cannot be made."""
    sites = sites_for(subject.model.recorded, plan)
    stats: dict[str, Stat] = {}
    if needs_ranges(plan, subject):
        length = max(len(w.ids) for w in windows) if windows else 0
        if not length:
            raise ValueError("the plan's grids need ranges, and there is no calibration text")
        treatment = treatment_for(subject.model.recorded, plan, [plan.resolve(sites)], length)
        stats = calibrate(subject.model, treatment, team, [w.ids for w in windows], on_window)
    return Solved.solve(plan, subject.name, subject.content, sites, stats)


def needs_ranges(plan: Plan, subject: Subject) -> bool:
    """Whether a plan rounds an activation to a grid whose range calibration has to find."""
    sites = sites_for(subject.model.recorded, plan)
    specs = plan.resolve(sites)
    return any(specs[s.name].observer is not None for s in sites if not s.is_weight)


def evaluate(
    subject: Subject,
    windows: Sequence[Window],
    team: Team,
    solved: Solved | None = None,
    twin: str = PREFILL_REFERENCE,
    by_token: bool = False,
    on_window: OnWindow | None = None,
) -> dict[str, Any]:
    """Figures of a text: {"float": .., "plan": .., "against float": ..}, the latter two only with a plan.

    "float" is the same program with nothing rounded; without a plan it has the engine's own bits. For a plan in integer
    arithmetic "in floats" names the layers that stay in floats, with the reasons. by_token: see `figures.text_figures`.
    on_window: called with the number of windows done and of all windows.
    """
    length, program = max(len(w.ids) for w in windows), subject.model.recorded
    specs, treatment = {}, Treatment(sites=())
    if solved is not None:
        sites = sites_for(program, solved.plan)
        solved.check(subject.name, subject.content, sites)
        specs = solved.plan.resolve(sites)
        treatment = treatment_for(program, solved.plan, [specs], length)
    rig = rig_for(subject, treatment, team, length, twin)
    base, planned, planned_setup = [], [], FLOAT
    if solved is not None:
        planned_setup = Setup(specs, solved.grids, solved.plan.arithmetic)
    for done, window in enumerate(windows, 1):
        base.append(_scored(rig, FLOAT, window, None))
        if solved is not None:
            planned.append(_scored(rig, planned_setup, window, rig.hidden()))
        if on_window:
            on_window(done, len(windows))
    found = dict(float=text_figures(base, by_token))
    if solved is not None:
        found |= {"plan": text_figures(planned, by_token), "against float": compared_figures(planned, base)}
    floats = rig.layers.choose(specs).floats if planned_setup.arithmetic == INTEGER else {}
    return found | ({"in floats": floats} if floats else {})


def _scored(rig: Rig, setup: Setup, window: Window, base: np.ndarray | None) -> dict[str, Any]:
    setup.put_on(rig)
    rig.load(window.ids, window.targets, base)
    rig.run()
    return window_figures(rig.scores(), window, base is not None)
