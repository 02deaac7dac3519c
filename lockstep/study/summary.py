"""What a study's files say of its model: sites, what calibration saw there, and how grids fit it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from lockstep import __version__
from lockstep.native.numbers import versions as compilers
from lockstep.ops.rounded.grids import SCALE, ZERO_POINT
from lockstep.ptq.figures import figures
from lockstep.ptq.integer import LinearLayers
from lockstep.ptq.observers import Stat
from lockstep.ptq.rewrite import rounded
from lockstep.ptq.spec import Spec
from lockstep.study.scoring.subject import Subject, kv_bytes, weight_bytes
from lockstep.study.trials import Study
from lockstep.weights.tensor import StoredTensor

FORM = 1
BINS = 48  # of a histogram in study.json


def study_record(
    study: Study, stats: Mapping[str, Stat], forwards: int, threads: int, baseline: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of study.json. baseline: figures of the model in float, None before it ran."""
    return dict(
        form=FORM,
        model=dict(name=study.model_name, hash=study.content, weights=study.weights),
        texts=study.texts,
        sites=[asdict(site) for site in study.sites],
        inside=list(study.treatment.inside),
        mask="additive" if study.treatment.additive else "structural",
        calibration=dict(forwards=forwards, windows=len(study.calibration)),
        evaluation=dict(
            windows=len(study.evaluation), length=study.length, round=study.round, rounds=len(study.rounds())
        ),
        stats={name: stat_record(stat) for name, stat in stats.items()},
        versions=dict(
            lockstep=__version__, python=platform.python_version(), numpy=np.__version__, numba=compilers()["numba"]
        ),
        threads=threads,
        num_trials=len(study.trials),
    ) | ({} if baseline is None else dict(baseline=baseline))


def stat_record(stat: Stat) -> dict[str, Any]:
    """Range and histogram of a site, with the range of each head; what was never seen has none."""
    made: dict[str, Any] = dict(count=int(stat.count.sum()), not_finite=int(stat.not_finite.sum()))
    if not stat.histogram.any():
        return made
    whole = stat.over_heads()
    points, weights = whole.points(0)
    counts, edges = np.histogram(points, BINS, (float(whole.low[0]), float(whole.high[0])), weights=weights)
    made |= dict(min=float(whole.low[0]), max=float(whole.high[0]))
    made["histogram"] = dict(edges=edges.tolist(), counts=counts.round().tolist())
    if stat.num_heads > 1 and np.isfinite(stat.low).all() and np.isfinite(stat.high).all():
        made |= dict(head_min=stat.low.tolist(), head_max=stat.high.tolist())
    return made


class Figures:
    """What is said of trials besides their scores; equal grids of a site are looked at once."""

    def __init__(self, study: Study, subject: Subject, stats: Mapping[str, Stat]) -> None:
        self._study, self._stats = study, stats
        made = rounded(subject.model.recorded, study.treatment)
        self._layers = LinearLayers(made)
        self._parts: dict[str, list[StoredTensor]] = {
            name: [part.weight.parts[part.index] for part in parts] for name, parts in made.weights.items()
        }
        self._seen: dict[tuple[str, str], dict[str, Any]] = {}

    def sizes(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        """weight_bytes, bits_per_weight, and kv_bytes a token, None where keys and values are not all rounded."""
        total, count = weight_bytes(self._parts, specs)
        return dict(weight_bytes=total, bits_per_weight=8 * total / count, kv_bytes=kv_bytes(self._study.sites, specs))

    def integer(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        """layers: how many linear layers are in integers under specs. floats: the others, each with its reason."""
        choice = self._layers.choose(specs)
        return dict(layers=len(choice.layers), floats=choice.floats)

    def sites(
        self, specs: Mapping[str, Spec], grids: Mapping[str, np.ndarray], weights: Mapping[str, float | None]
    ) -> dict[str, Any]:
        """{site: spec and, of a static grid of an activation, scale, zero, saturation, code_use, sqnr by head, of a
        weight sqnr}, for all that are rounded. weights: signal to noise by site, as far as it is known."""
        made = {name: self._site(name, spec, grids.get(name)) for name, spec in specs.items() if not spec.is_off}
        return {name: site | dict(sqnr=[weights[name]]) if name in weights else site for name, site in made.items()}

    def _site(self, name: str, spec: Spec, rows: np.ndarray | None) -> dict[str, Any]:
        key = name, str(spec)
        if key not in self._seen:
            self._seen[key] = self._made(name, spec, rows)
        return self._seen[key]

    def _made(self, name: str, spec: Spec, rows: np.ndarray | None) -> dict[str, Any]:
        made: dict[str, Any] = dict(spec=str(spec))
        found = None if rows is None or name not in self._stats else figures(self._stats[name], rows)
        if rows is None or found is None:
            return made
        return made | dict(
            scale=rows[:, SCALE].tolist(),
            zero=[int(zero) for zero in rows[:, ZERO_POINT]] if spec.what.is_integer else None,
            saturation=[f.saturated for f in found],
            code_use=[f.used / f.codes for f in found],
            sqnr=[f.sqnr for f in found],
        )
