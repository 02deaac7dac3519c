"""Calibration: one pass over a text counts the numbers at every site, once for all grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lockstep.engine.model import Model
from lockstep.ops.linear.linear import Linear
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.observe import Observe, cleared
from lockstep.ptq.observers import Stat
from lockstep.ptq.rewrite import Rounded, Treatment
from lockstep.ptq.unroll import unroll
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor
from lockstep.runtime.threads import Team
from lockstep.study.scoring.rig import Rig
from lockstep.study.scoring.subject import HEAD
from lockstep.study.scoring.text import NO_TARGET

OBSERVED = ("x", "width", "column", "stride", "head_width", "num_heads", "seen_only", "additive")
COUNTED = ("count", "not_finite", "low", "high", "histogram")  # arrays of a Stat, by head


class Observers:
    """Counters for all sites of a program.

    Each takes the place of a rounding op. Which site and head an op rounds is found by the memory of its grids, which
    is a part of the site's grids. copies: of counters, one for each thread.
    """

    def __init__(self, rounded: Rounded, copies: int) -> None:
        self._places = {
            rows[head : head + 1].ctypes.data: (name, head)
            for name, rows in rounded.grids.items()
            for head in range(len(rows))
        }
        self._copies, self._counters = copies, dict[tuple[str, int], np.ndarray]()

    def observing(self, program: Program) -> Program:
        """The program with every rounding of a site replaced by counting; other rounding ops are left out."""
        return program.rewritten([made for op in program.ops for made in self._observed(op)])

    def _observed(self, op: Operands) -> Iterator[Operands]:
        if not isinstance(op, FakeQuant):
            yield op
            return
        place = self._places.get(op.grids.values.ctypes.data)
        if place is not None:
            if place not in self._counters:
                self._counters[place] = cleared(op.num_heads, self._copies)
            made = {field: getattr(op, field) for field in OBSERVED}
            counters = Setting(f"{place[0]}.counters", self._counters[place])
            yield Observe(**made, counters=counters, copies=self._copies)
        if op.out is not op.x:
            yield op  # its grid is off, so that it only copies

    def observing_logits(self, program: Program, logits: Tensor) -> Program:
        """The program with the logits of all rows, held in memory as a whole and counted as site "head"."""
        [head] = [op for op in program.ops if isinstance(op, Linear) and op.out is logits]
        hidden = program.results["hidden"]
        x = program.emit(head.changed(x=hidden, out=program.tensor("head.seen", hidden.rows, head.out.width)))
        self._counters[HEAD, 0] = cleared(1, self._copies)
        counters = Setting(f"{HEAD}.counters", self._counters[HEAD, 0])
        width = head.out_features
        where = dict(width=x.width, column=head.column, stride=width, head_width=width, num_heads=1)
        program.emit(Observe(x=x, counters=counters, copies=self._copies, **where))
        return program

    def take(self) -> dict[str, Stat]:
        """Statistics by site of what was counted since the last call."""
        found: dict[str, dict[int, Stat]] = {}
        for (name, head), counters in self._counters.items():
            stat = Stat.empty(name, len(counters) // self._copies)
            stat.take(counters)
            found.setdefault(name, {})[head] = stat
        return {name: _joined(name, heads) for name, heads in found.items()}


def _joined(name: str, heads: dict[int, Stat]) -> Stat:
    """The Stat of a site whose heads were counted one by one."""
    parts = [heads[head] for head in sorted(heads)]
    return Stat(name, *(np.concatenate([getattr(part, field) for part in parts]) for field in COUNTED))


def calibrate(
    model: Model,
    treatment: Treatment,
    team: Team,
    windows: Sequence[Sequence[int]],
    on_window: Callable[[int, int], object] | None = None,
) -> dict[str, Stat]:
    """Statistics of every site of a treatment, from one forward pass over each window of token ids.

    Nothing is rounded during the pass, so that the statistics hold for all grids. Attention is taken apart head by
    head, so that every intermediate is a tensor. on_window: called with the number of windows done and of all windows.
    """
    made: list[Observers] = []

    def observing(rounded: Rounded) -> Program:
        made.append(Observers(rounded, team.num_threads))
        program = made[0].observing(unroll(rounded.program))
        return made[0].observing_logits(program, model.logits) if HEAD in rounded.grids else program

    rig = Rig(model, treatment, team, max(map(len, windows)), observing)
    stats: dict[str, Stat] = {}
    for done, ids in enumerate(windows, 1):
        rig.load(ids, [NO_TARGET] * len(ids))
        rig.run(last=rig.score_index)
        for name, stat in made[0].take().items():
            stats[name] = stats[name].merge(stat) if name in stats else stat
        if on_window:
            on_window(done, len(windows))
    return stats
