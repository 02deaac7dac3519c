"""Planted mistakes of speculative decoding: the proof must find each of them, or it would show nothing.

Each function takes a pytest.MonkeyPatch and puts one mistake into the engine. An engine without drafts is not changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from lockstep.engine import engine, runner
from lockstep.engine.cache import memory
from lockstep.engine.cache.prefix import PrefixCache
from lockstep.engine.request import Request
from lockstep.engine.runner import Runner, Span
from lockstep.engine.sampling import Adjustment, sampled_rows
from lockstep.engine.scheduler import Scheduler
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify, GatedDeltaVerify, absorb_all
from lockstep.ops.rewrite import verifying
from lockstep.runtime.program import CacheArray, Program


def before_each_step(patch: pytest.MonkeyPatch, change: Callable[[Runner, Sequence[Span]], None]) -> None:
    """Calls `change` with the Runner and the spans before each step."""
    step = Runner.step

    def changed(self: Runner, spans: Sequence[Span], clock: np.ndarray | None = None) -> Any:
        change(self, spans)
        return step(self, spans, clock)

    patch.setattr(Runner, "step", changed)


def rejected_record_applied(patch: pytest.MonkeyPatch) -> None:
    """The state absorbs one record too many: that of the first wrong draft."""
    drafts: dict[tuple[Runner, int], tuple[int, int]] = {}  # {(runner, slot): positions of the drafts of the last step}

    def change(self: Runner, spans: Sequence[Span]) -> None:
        for span in spans:
            first, end = drafts.get((self, span.slot), (0, 0))
            if first <= span.start < end and span.start - span.num_pending == first:
                absorb(self, span, span.num_pending + 1)
            certain = span.start + len(span.token_ids) - span.num_drafts
            drafts[self, span.slot] = certain, certain + span.num_drafts

    before_each_step(patch, change)


def absorb(self: Runner, span: Span, count: int) -> None:
    """Absorbs `count` pending records into the state, as the step would."""
    for op in self.program.ops:
        if isinstance(op, GatedDeltaVerify):
            state, records = (
                self.caches[array.name].view(np.float32).reshape(-1, *array.shape)[span.slot]
                for array in (op.state, op.records)
            )
            absorb_all(state, records, span.start - span.num_pending + count, count, op.num_k_heads)
    span.num_pending = 0


def accepted_record_skipped(patch: pytest.MonkeyPatch) -> None:
    """The state does not absorb the record of the first accepted draft."""

    def change(self: Runner, spans: Sequence[Span]) -> None:
        for span in spans:
            span.num_pending = max(0, span.num_pending - 1)

    before_each_step(patch, change)


def stale_ring_row(patch: pytest.MonkeyPatch) -> None:
    """The ring buffer of convolution rows is one row too short: the last draft overwrites a row that is needed."""

    def short(program: Program, num_drafts: int) -> Program:
        made = verifying(program, num_drafts)
        rings = {op.state: op.num_rows - 1 for op in made.ops if isinstance(op, DeltaInputsVerify)}
        shorter = {c: CacheArray(c.name, c.kind, c.dtype, (rows, *c.shape[1:])) for c, rows in rings.items()}
        ops = [
            op.changed(state=shorter[op.state], num_rows=op.num_rows - 1) if isinstance(op, DeltaInputsVerify) else op
            for op in made.ops
        ]
        caches, made = made.caches, made.rewritten(ops)
        made.caches = [shorter.get(cache, cache) for cache in caches]
        return made

    patch.setattr(runner, "verifying", short)


def noise_of_the_wrong_position(patch: pytest.MonkeyPatch) -> None:
    """The tokens after drafts are chosen with the noise of the first row's position."""

    def wrong(request: Request, start: int, end: int, *others: Any) -> dict[int, dict[str, Any]]:
        rows = sampled_rows(request, start, end, *others)
        for fields in rows.values():
            if "position" in fields:
                fields["position"] = end
        return rows

    patch.setattr(engine, "sampled_rows", wrong)


def shared_penalties(patch: pytest.MonkeyPatch) -> None:
    """All rows of a request have the penalties of its first row: drafts before them do not count as output."""
    rows = Adjustment.rows

    def shared(self: Adjustment, *of: Any) -> list[dict[str, int]]:
        made = rows(self, *of)
        return [fields and fields | dict(num_seen=made[0].get("num_seen", 0)) for fields in made]

    patch.setattr(Adjustment, "rows", shared)


def shared_mask_row(patch: pytest.MonkeyPatch) -> None:
    """The masks of a request's rows lie in the same memory: all rows have the mask of the last row."""
    rows = Adjustment.rows

    def shared(self: Adjustment, *of: Any) -> list[dict[str, int]]:
        made = rows(self, *of)
        return [fields and fields | dict(mask=made[-1].get("mask", 0)) for fields in made]

    patch.setattr(Adjustment, "rows", shared)


def block_named_early(patch: pytest.MonkeyPatch) -> None:
    """After a step with drafts the newest token counts as computed: its block is named before it is full."""
    settle = Scheduler.settle

    def early(self: Scheduler, request: Request, num_next: int = 0) -> None:
        settle(self, request, num_next)
        if self.prefix and not num_next:
            request.num_computed += 1
            self.prefix.computed(request)
            request.num_computed -= 1

    patch.setattr(Scheduler, "settle", early)


def kept_without_its_drafts(patch: pytest.MonkeyPatch) -> None:
    """A state is kept as it lies in its slot, before it has absorbed the accepted drafts."""
    read = memory.Recurrence.read
    patch.setattr(memory.Recurrence, "read", lambda self, slot, position, num_pending: read(self, slot, position, 0))


def state_lost(patch: pytest.MonkeyPatch) -> None:
    """No state is kept where accepted drafts are pending: no bit differs, but later prompts find less of their
    prefix."""
    method = "_keep_state"
    keep = getattr(PrefixCache, method)
    lossy = lambda self, states, request, name: None if request.num_pending else keep(self, states, request, name)
    patch.setattr(PrefixCache, method, lossy)


FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    fault.__name__: fault
    for fault in (
        rejected_record_applied,
        accepted_record_skipped,
        stale_ring_row,
        noise_of_the_wrong_position,
        shared_penalties,
        shared_mask_row,
        block_named_early,
        kept_without_its_drafts,
    )
}
