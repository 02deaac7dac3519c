"""How often integer and float arithmetic give different codes: layer by layer, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lockstep.engine.model import Model
from lockstep.ops.integer.code_linear import CodeLinear
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ptq.integer import INTEGER
from lockstep.ptq.rewrite import Treatment
from lockstep.ptq.spec import Spec
from lockstep.runtime.program import Tensor
from lockstep.runtime.threads import Team
from lockstep.study.scoring.rig import Rig
from lockstep.study.scoring.text import NO_TARGET


class Different(NamedTuple):
    """How many numbers at a site integer arithmetic gives another value, and how many numbers there are."""

    num_different: int
    num_all: int


def disagreement(
    model: Model,
    treatment: Treatment,
    team: Team,
    windows: Sequence[Sequence[int]],
    grids: Mapping[str, np.ndarray],
    specs: Mapping[str, Spec],
) -> dict[str, Different]:
    """{site of a layer's output: Different} over windows of token ids, for layers that have an integer kernel.

    Every layer gets its input from the float program, so that only its own arithmetic differs.
    """
    pair = _Pair(model, treatment, team, max(map(len, windows)), grids, specs)
    found: dict[str, Different] = {}
    for ids in windows:
        for site, one in pair.compare(ids):
            before = found.get(site, Different(0, 0))
            found[site] = Different(*(a + b for a, b in zip(before, one, strict=True)))
    return found


class _Pair:
    """A float rig, and one in integer arithmetic."""

    def __init__(
        self,
        model: Model,
        treatment: Treatment,
        team: Team,
        length: int,
        grids: Mapping[str, np.ndarray],
        specs: Mapping[str, Spec],
    ) -> None:
        self._float, self._integer = (Rig(model, treatment, team, length, keep=True) for _ in range(2))
        for rig, arithmetic in ((self._float, "float"), (self._integer, INTEGER)):
            rig.set_grids(grids)
            rig.set_weights(specs, arithmetic)

    def compare(self, ids: Sequence[int]) -> Iterator[tuple[str, Different]]:
        """(site, Different) for each integer layer's output of a window."""
        for rig in (self._float, self._integer):
            rig.load(ids, [NO_TARGET] * len(ids))
        self._float.run()
        for out in self._outputs():
            self._run(out)
            for op in self._integer.program.ops:
                if isinstance(op, FakeQuant) and op.out is out is op.x:
                    yield op.grids.name, self._differences(op)

    def _outputs(self) -> list[Tensor]:
        """Outputs of integer layers that are computed for every token and rounded."""
        ops = self._integer.program.ops
        rounded = {op.out for op in ops if isinstance(op, FakeQuant)}
        layers = [op.out for op in ops if isinstance(op, CodeLinear) and op.out.rows != "R"]  # no row is sampled
        return [out for out in dict.fromkeys(layers) if out in rounded]

    def _run(self, out: Tensor) -> None:
        """Runs the integer layers that write a tensor, on the float program's input, and the op that rounds it."""
        ops = self._integer.program.ops
        for index, op in enumerate(ops):
            if isinstance(op, CodeLinear) and op.out is out:
                coding = next(i for i, maker in enumerate(ops) if op.x in maker.outputs)
                x = ops[coding].x
                self._integer.view(x)[...] = self._float.view(x)
                self._integer.run(coding, coding + 1)
                self._integer.run(index, index + 1)
        for index, op in enumerate(ops):
            if isinstance(op, FakeQuant) and op.out is out:
                self._integer.run(index, index + 1)

    def _differences(self, op: FakeQuant) -> Different:
        one, two = (rig.view(op.out) for rig in (self._float, self._integer))
        starts = [op.column + h * op.stride for h in range(op.num_heads)]
        heads = [slice(start, start + op.head_width) for start in starts]
        count = sum(int((one[:, head] != two[:, head]).sum()) for head in heads)
        return Different(count, len(one) * op.num_heads * op.head_width)
