"""Rounded (folded) weights: made when a trial first needs them, and kept in memory up to a limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep.ops.elementwise.embed import Embed
from lockstep.ops.integer.code_weights import FORMAT as CODES
from lockstep.ops.linear.linear import Linear
from lockstep.ops.sampling.score import Score
from lockstep.ptq.parts import CodedWeight, FoldedWeight
from lockstep.ptq.rewrite import Part
from lockstep.ptq.spec import Spec
from lockstep.runtime.backend import Layout
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Weight
from lockstep.weights.store import WeightStore

MAX_BYTES = 4 << 30


class FoldedStore(WeightStore):
    """The weights of a model and rounded ones. The most recently used rounded weights stay in memory, up to max_bytes.

    num_folds: how often a weight was rounded and packed. noise: {(part name, spec): `noise.powers`} of every part that
    was rounded.
    """

    def __init__(self, store: WeightStore, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self._store, self._max_bytes, self.num_folds = store, max_bytes, 0
        self.noise: dict[tuple[str, str], tuple[float, float]] = {}
        self._kept: OrderedDict[tuple[str, str], tuple[np.ndarray, ...]] = OrderedDict()

    def arrays(self, weight: Weight, layout: Layout) -> tuple[np.ndarray, ...]:
        if not isinstance(weight, FoldedWeight):
            return self._store.arrays(weight, layout)
        key = weight.name, layout.name
        if key not in self._kept:
            self._kept[key] = self.make(weight.folded(), layout)
            self.noise |= weight.noise
            self.num_folds += 1
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(a.nbytes for arrays in self._kept.values() for a in arrays) > self._max_bytes:
            self._kept.popitem(last=False)
        return self._kept[key]


class FoldedWeights:
    """The weights of a rounded program under changing specs. sites: {site: the parts of weights that it stands for}."""

    def __init__(self, sites: Mapping[str, list[Part]]) -> None:
        self._sites: dict[Weight, list[tuple[int, str]]] = {}
        for name, parts in sites.items():
            for part in parts:
                self._sites.setdefault(part.weight, []).append((part.index, name))
        self._folded: dict[tuple[Weight, str], FoldedWeight] = {}
        self._coded: dict[tuple[Weight, str], CodedWeight] = {}

    def weight(self, weight: Weight, specs: Mapping[str, Spec]) -> Weight:
        """The weight with its parts rounded by specs ({site: Spec}); the weight itself if no part is rounded."""
        with_spec = [(i, specs[name]) for i, name in self._sites.get(weight, ()) if name in specs]
        rounded = tuple((i, spec) for i, spec in with_spec if not spec.is_off)
        key = ", ".join(f"{i} {spec}" for i, spec in rounded)
        if rounded and (weight, key) not in self._folded:
            folded = FoldedWeight(f"{weight.name} on {key}", "f32", weight.shape, weight.parts, None, rounded)
            self._folded[weight, key] = folded
        return self._folded[weight, key] if rounded else weight

    def codes(self, weight: Weight, specs: Mapping[str, Spec]) -> CodedWeight:
        """The weight as codes. specs must have an integer grid of at most 8 bits for each of its parts."""
        rounded = tuple((i, specs[name]) for i, name in sorted(self._sites[weight]))
        key = ", ".join(str(spec) for _, spec in rounded)
        if (weight, key) not in self._coded:
            name = f"{weight.name} in codes of {key}"
            self._coded[weight, key] = CodedWeight(
                name, CODES, weight.shape, weight.parts, None, rounded, source=weight
            )
        return self._coded[weight, key]

    def like(self, weight: Weight, specs: Mapping[str, Spec]) -> Weight:
        """The weight that replaces a weight under other specs: codes for codes, else floats."""
        if isinstance(weight, CodedWeight) and weight.source is not None:
            return self.codes(weight.source, specs)
        return self.weight(weight, specs)


def with_weight(op: Operands, name: str, weight: Weight) -> Any:
    """The op with another weight as operand `name`. ValueError for an op that multiplies in another format."""
    if isinstance(op, Embed):
        return op.changed(table=weight)
    if isinstance(op, (Linear, Score)) and weight.format != (op.format or op.weight.format):
        raise ValueError(
            f"weight {weight.name}: the layer multiplies {op.format}, and rounded weights are float32; expected a "
            f"model that was loaded with weights f32"
        )
    return op.changed(**{name: weight})
