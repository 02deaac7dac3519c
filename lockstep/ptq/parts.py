"""Weights whose parts a plan changes: multiplied by attention's scale, rounded to grids, turned into codes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lockstep.formats.parts.finite import check_finite
from lockstep.ops.integer.code_weights import CodeTensor, code_tensor, code_weight
from lockstep.ptq.noise import powers
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import Folded, fold
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A stored tensor that is read as values * factor + offset, in float32, rounded after each operation; an offset of
    0 is not added."""

    factor: float = 1.0
    offset: float = 0.0

    def to_f32(self, rows: slice = slice(None)) -> np.ndarray:
        return self.moved(super().to_f32(rows) * np.float32(self.factor))

    def moved(self, values: np.ndarray) -> np.ndarray:
        """Multiplied values, plus the offset."""
        return values + np.float32(self.offset) if self.offset else values


def fold_part(part: StoredTensor, spec: Spec) -> Folded:
    """A part as [features, width] on the grid of a spec. The offset of a ScaledTensor is left out.

    A grid of integers or small floats is fitted to the stored numbers, and its scale is multiplied by the factor, so
    that the codes do not depend on it. A grid of blocks, whose scales are not float32, is fitted to the multiplied
    numbers. ValueError for weights that are not finite and for blocks that do not divide the width.
    """
    values = StoredTensor.to_f32(part)
    check_finite(part, values)
    values, factor = values.reshape(-1, part.shape[-1]), part.factor if isinstance(part, ScaledTensor) else 1.0
    if spec.what.block or spec.is_off:
        values, factor = values * np.float32(factor), 1.0
    return fold(values, spec, part.name, factor)


@dataclass(frozen=True, eq=False)
class FoldedWeight(Weight):
    """A weight whose parts are rounded in memory. specs: (index of a part, its spec), ... noise: {(part name, spec):
    `noise.powers`} of the parts that were rounded."""

    specs: tuple[tuple[int, Spec], ...] = ()
    noise: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def folded(self) -> Weight:
        """The weight with rounded numbers."""
        parts = list(self.parts)
        for index, spec in self.specs:
            parts[index] = _rounded(parts[index], self.fold(index, spec))
        return Weight(self.name, self.format, self.shape, tuple(parts))

    def fold(self, index: int, spec: Spec) -> Folded:
        """A part on the grid of a spec; records its noise."""
        part = self.parts[index]
        folded = fold_part(part, spec)
        values = StoredTensor.to_f32(part)
        if isinstance(part, ScaledTensor):
            values = values * np.float32(part.factor)
        self.noise[part.name, str(spec)] = powers(values, folded.values)
        return folded


def _rounded(part: StoredTensor, folded: Folded) -> StoredTensor:
    values = folded.values.reshape(part.shape)
    values = part.moved(values) if isinstance(part, ScaledTensor) else values
    return StoredTensor(part.name, "f32", part.shape, values)


@dataclass(frozen=True, eq=False)
class CodedWeight(FoldedWeight):
    """A weight as codes of integer grids, for integer arithmetic.

    source: the float weight, from whose parts the codes are made when the weight is first read.
    """

    source: Weight | None = None

    def folded(self) -> Weight:
        codes = (_codes(self.parts[index].name, self.fold(index, spec)) for index, spec in self.specs)
        return code_weight(self.name, *codes)


def _codes(name: str, folded: Folded) -> CodeTensor:
    assert folded.codes is not None and folded.scale is not None and folded.zero is not None, name
    return code_tensor(name, folded.codes, folded.scale, folded.zero)
