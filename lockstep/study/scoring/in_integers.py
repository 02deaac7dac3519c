"""Runs a confirmed plan in the other arithmetic, float or integer: figures, layers in floats, codes that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lockstep.ptq.integer import INTEGER
from lockstep.runtime.threads import Team
from lockstep.study.scoring.disagreement import disagreement
from lockstep.study.scoring.evaluate import FLOAT, Setup, rig_for
from lockstep.study.scoring.figures import compared_figures, text_figures, window_figures
from lockstep.study.scoring.subject import Subject
from lockstep.study.trials import Study

MAX_WINDOWS = 2  # whose codes are compared


class InIntegers:
    """Scores the evaluation windows of a study under plans in integer arithmetic and the same plans in floats."""

    def __init__(self, study: Study, subject: Subject, team: Team) -> None:
        self._study, self._subject, self._team = study, subject, team
        self._rig = rig_for(subject, study.treatment, team, study.length)
        FLOAT.put_on(self._rig)
        self._hidden, self._base = [], []
        for window in study.evaluation:
            self._rig.load(window.ids, window.targets)
            self._rig.run()
            self._hidden.append(self._rig.hidden())
            self._base.append(window_figures(self._rig.scores(), window, False))

    def record(self, setup: Setup, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """{"integer": {metrics, number of integer layers, layers in floats with the reasons}, "float": {metrics} if the
        setup is in integers, "disagreement": {site: [numbers that differ, all]}}; empty if no layer can be integer.
        metrics: those of the setup."""
        choice = self._rig.layers.choose(setup.specs)
        if not choice.layers:
            return {}
        made: dict[str, Any] = {}
        if setup.arithmetic == INTEGER:
            made["float"] = dict(metrics=self._metrics(replace(setup, arithmetic="float")))
        else:
            metrics = self._metrics(replace(setup, arithmetic=INTEGER))
        made["integer"] = dict(metrics=metrics, layers=len(choice.layers), floats=choice.floats)
        return made | dict(disagreement=self._disagreement(setup))

    def _metrics(self, setup: Setup) -> dict[str, Any]:
        setup.put_on(self._rig)
        figures = []
        for window, hidden in zip(self._study.evaluation, self._hidden, strict=True):
            self._rig.load(window.ids, window.targets, hidden)
            self._rig.run()
            figures.append(window_figures(self._rig.scores(), window, True))
        return text_figures(figures, self._study.by_token) | compared_figures(figures, self._base)

    def _disagreement(self, setup: Setup) -> dict[str, Sequence[int]]:
        windows = [window.ids for window in self._study.evaluation[:MAX_WINDOWS]]
        treatment = self._study.treatment
        found = disagreement(self._subject.model, treatment, self._team, windows, setup.grids, setup.specs)
        return {site: list(different) for site, different in found.items()}
