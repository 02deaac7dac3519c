"""Runs trials on one rig: each begins at the first layer that differs from a plan that has run before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.ptq.observers import Stat
from lockstep.ptq.solved import Solved
from lockstep.runtime.program import Tensor
from lockstep.runtime.threads import Team
from lockstep.study.scoring.evaluate import FLOAT, PREFILL_REFERENCE, Setup, rig_for
from lockstep.study.scoring.figures import window_figures
from lockstep.study.scoring.subject import Subject
from lockstep.study.trials import Study

FLOAT_TRIAL = -1  # the index of the model in float among trials
State = dict[Tensor, np.ndarray]
STATE_BYTES = 2 << 30  # for layers' inputs, kept for the windows of a round, in all processes together


@dataclass
class Outcome:
    """The results of a trial on some windows. trial: its index, or FLOAT_TRIAL. windows: {index: figures}.
    layers_saved: layers that were not run because an earlier plan had run the same. weights: {site: signal to noise in
    decibels} of rounded weights. failure: (window, what went wrong); the window is -1 if none ran."""

    trial: int
    windows: dict[int, dict[str, Any]] = field(default_factory=dict)
    layers_run: int = 0
    layers_saved: int = 0
    weights: dict[str, float | None] = field(default_factory=dict)
    failure: tuple[int, str] | None = None


class Bench:
    """A rig, and the layers' inputs that the float model and the base plan left for each window.

    Other trials begin with these only: so the number of layers that a trial runs does not depend on how trials are
    shared among processes or interrupted.
    """

    def __init__(
        self, study: Study, subject: Subject, stats: Mapping[str, Stat], team: Team, state_bytes: int = STATE_BYTES
    ) -> None:
        if subject.content != study.content:
            raise ValueError(f"{study.model}: the model's files have changed since the study began")
        self._study, self._subject, self._stats = study, subject, stats
        self.rig = rig_for(subject, study.treatment, team, study.length, PREFILL_REFERENCE)
        self._setups: dict[int, Setup | str] = {FLOAT_TRIAL: FLOAT}
        self._max_state_bytes = state_bytes // study.round

    def round(self, windows: Sequence[int], trials: Sequence[int]) -> Iterator[Outcome]:
        """Runs the float model, and then trials, on some windows."""
        self._states: dict[int, dict[bytes, State]] = {window: {} for window in windows}
        self._hidden: dict[int, np.ndarray] = {}
        for trial in (FLOAT_TRIAL, *trials):
            yield self._run(trial, windows)

    def setup(self, trial: int) -> Setup | str:
        """A trial's grids and weights, or the reason why it has none."""
        if trial not in self._setups:
            self._setups[trial] = self._made(trial)
        return self._setups[trial]

    def _made(self, trial: int) -> Setup | str:
        study, plan = self._study, self._study.trials[trial].plan
        try:
            solved = Solved.solve(plan, study.model_name, study.content, study.sites, self._stats)
        except ValueError as error:
            return str(error)
        return Setup(plan.resolve(study.sites), solved.grids, plan.arithmetic)

    def _run(self, trial: int, windows: Sequence[int]) -> Outcome:
        """Runs a trial on its windows; it ends at the first window that fails."""
        outcome, setup, window = Outcome(trial), self.setup(trial), -1
        if isinstance(setup, str):
            outcome.failure = window, setup
            return outcome
        try:
            setup.put_on(self.rig)
            outcome.weights = self.rig.weight_noise(setup.specs)
            prefixes = self.rig.prefixes()
            for window in windows:
                self._run_window(outcome, window, prefixes)
        except ValueError as error:
            outcome.failure = window, str(error)
        return outcome

    def _run_window(self, outcome: Outcome, index: int, prefixes: Sequence[bytes]) -> None:
        rig, window, states = self.rig, self._study.evaluation[index], self._states[index]
        rig.load(window.ids, window.targets, self._hidden.get(index))
        known = max((k for k, prefix in enumerate(prefixes) if prefix in states), default=0)
        starts = rig.layer_starts
        first = starts[known] if known else 0
        if known:
            rig.restore(first, states[prefixes[known]])
        if outcome.trial in (FLOAT_TRIAL, 0):
            first = self._run_keeping(first, known, prefixes, states)
        rig.run(first)
        outcome.layers_run += len(starts) - known
        outcome.layers_saved += known
        if outcome.trial == FLOAT_TRIAL:
            self._hidden[index] = rig.hidden()
        outcome.windows[index] = window_figures(rig.scores(), window, outcome.trial != FLOAT_TRIAL)

    def _run_keeping(self, first: int, known: int, prefixes: Sequence[bytes], states: dict[bytes, State]) -> int:
        """Runs up to the last layer, and keeps the inputs of each layer but the first as long as there is room; returns
        the index of the op to go on with."""
        used = sum(array.nbytes for state in states.values() for array in state.values())
        for k in range(max(known, 0) + 1, len(prefixes)):
            start = self.rig.layer_starts[k]
            self.rig.run(first, start)
            state, first = self.rig.state(start), start
            used += sum(array.nbytes for array in state.values())
            if used > self._max_state_bytes:
                break
            states[prefixes[k]] = state
        return first
