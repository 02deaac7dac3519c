"""What a study's files say about its model: its sites, the statistics of calibration, and how well grids fit them."""

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
NUM_BINS = 48  # of a histogram in study.json


def study_record(
    study: Study, stats: Mapping[str, Stat], forwards: int, threads: int, baseline: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of study.json. forwards: forward passes of calibration. baseline: figures of the float model, None
    before it ran."""
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
    """Range and histogram of a site, with the range of each head; a site without numbers has neither."""
    made: dict[str, Any] = dict(count=int(stat.count.sum()), not_finite=int(stat.not_finite.sum()))
    if not stat.histogram.any():
        return made
    whole = stat.over_heads()
    points, weights = whole.points(0)
    counts, edges = np.histogram(points, NUM_BINS, (float(whole.low[0]), float(whole.high[0])), weights=weights)
    made |= dict(min=float(whole.low[0]), max=float(whole.high[0]))
    made["histogram"] = dict(edges=edges.tolist(), counts=counts.round().tolist())
    if stat.num_heads > 1 and np.isfinite(stat.low).all() and np.isfinite(stat.high).all():
        made |= dict(head_min=stat.low.tolist(), head_max=stat.high.tolist())
    return made


class Figures:
    """Figures of trials besides their scores. Equal grids of a site are computed once."""

    def __init__(self, study: Study, subject: Subject, stats: Mapping[str, Stat]) -> None:
        self._study, self._stats = study, stats
        made = rounded(subject.model.recorded, study.treatment)
        self._layers = LinearLayers(made)
        self._parts: dict[str, list[StoredTensor]] = {
            name: [part.weight.parts[part.index] for part in parts] for name, parts in made.weights.items()
        }
        self._seen: dict[tuple[str, str], dict[str, Any]] = {}

    def sizes(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        """weight_bytes, bits_per_weight, and kv_bytes for each token (None unless all keys and values are rounded)."""
        total, num_weights = weight_bytes(self._parts, specs)
        per_token = kv_bytes(self._study.sites, specs)
        return dict(weight_bytes=total, bits_per_weight=8 * total / num_weights, kv_bytes=per_token)

    def integer(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        """layers: how many linear layers multiply integers under specs. floats: {the other layers' sites: the
        reason}."""
        choice = self._layers.choose(specs)
        return dict(layers=len(choice.layers), floats=choice.floats)

    def sites(
        self, specs: Mapping[str, Spec], grids: Mapping[str, np.ndarray], weights: Mapping[str, float | None]
    ) -> dict[str, Any]:
        """{site: its figures} for all rounded sites: spec; for a static grid of an activation also scale, zero,
        saturation, code_use and sqnr of each head; for a weight sqnr. weights: known signal to noise of weights, by
        site."""
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
