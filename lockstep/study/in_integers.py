"""A confirmed plan in integer arithmetic: its loss, the layers that stay in floats, and codes that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.ptq.integer import Integers, integers
from lockstep.ptq.rewrite import Rounded
from lockstep.runtime.program import Program
from lockstep.runtime.threads import Team
from lockstep.study.disagreement import disagreement
from lockstep.study.evaluate import FLOAT, Setup, rig_for
from lockstep.study.rig import Rig
from lockstep.study.scoring import compared_figures, text_figures, window_figures
from lockstep.study.subject import Subject
from lockstep.study.trials import Study

MOST_WINDOWS = 2  # whose codes are compared


class InIntegers:
    """The evaluation windows of a study under plans whose linear layers multiply integers wherever they can."""

    def __init__(self, study: Study, subject: Subject, team: Team) -> None:
        self._study, self._subject, self._team = study, subject, team
        float_rig = rig_for(subject, study.treatment, team, study.length)
        FLOAT.put_on(float_rig)
        self._hidden, self._base = [], []
        for window in study.evaluation:
            float_rig.load(window.ids, window.targets)
            float_rig.run()
            self._hidden.append(float_rig.hidden())
            self._base.append(window_figures(float_rig.scores(), window, False))

    def record(self, setup: Setup) -> dict[str, Any]:
        """{"integer": {metrics, layers that stay in floats with the reason, how many are integer}, "disagreement":
        {site: [numbers that differ, all]}}; nothing where no layer is integer."""
        made: list[Integers] = []

        def change(rounded: Rounded) -> Program:
            made.append(integers(rounded, setup.specs))
            return made[0].program

        rig = Rig(self._subject.model, self._study.treatment, self._team, self._study.length, change)
        if not made[0].num_layers:
            return {}
        figures = self._figures(rig, setup)
        metrics = text_figures(figures, self._study.by_token) | compared_figures(figures, self._base)
        integer = dict(metrics=metrics, layers=made[0].num_layers, floats=made[0].floats)
        return dict(integer=integer, disagreement=self._disagreement(setup))

    def _figures(self, rig: Rig, setup: Setup) -> list[dict[str, Any]]:
        setup.put_on(rig)
        found = []
        for window, hidden in zip(self._study.evaluation, self._hidden, strict=True):
            rig.load(window.ids, window.targets, hidden)
            rig.run()
            found.append(window_figures(rig.scores(), window, True))
        return found

    def _disagreement(self, setup: Setup) -> dict[str, Sequence[int]]:
        windows = [window.ids for window in self._study.evaluation[:MOST_WINDOWS]]
        treatment = self._study.treatment
        found = disagreement(self._subject.model, treatment, self._team, windows, setup.grids, setup.specs)
        return {site: list(different) for site, different in found.items()}
