"""The probe of the ops that choose tokens: rows of made-up logits with every kind of SamplingParams, without a model.

The other probes choose tokens with plain parameters only; here every output of these ops has a digest.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.engine.cache.pages import everywhere
from lockstep.engine.model import emit_sampling
from lockstep.engine.request import SamplingParams
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.engine.sampling import Adjustment
from lockstep.engine.selfcheck.weights import rows_of
from lockstep.ops.elementwise.select_rows import SelectRows, selected_rows
from lockstep.ops.sampling.adjust_logits import AdjustLogits
from lockstep.ops.sampling.sample import MAX_LOGPROBS, Sample
from lockstep.runtime.backend import OpTable
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Tensor
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore

NAME = "sampling"
ROWS, VOCABULARY, WIDTH = 8, 4101, 4112  # the last chunk of 4096 logits and the last word of a mask are not full
SEEN, ALLOWED = [7, 4100, 7, 12], np.full(129, 0x5A5A5A5A, np.uint32)
PENALTIES: dict[str, Any] = dict(
    repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=-0.3, logit_bias={4099: 2.5, 3: -1.5}
)
WISHES: tuple[dict[str, Any], ...] = (
    dict(),
    dict(temperature=0.7, logprobs=MAX_LOGPROBS),
    dict(**PENALTIES, logprobs=3),
    dict(min_tokens=5),
    dict(logits_mask=lambda _: ALLOWED),
    dict(temperature=1.3, top_p=0.9, **PENALTIES, min_tokens=5, logits_mask=lambda _: ALLOWED),
    dict(temperature=0.9, min_p=0.05, logit_bias={5: 100.0}),
    dict(presence_penalty=1.5, temperature=0.5, top_k=9),
)


@dataclass(frozen=True)
class ProbeModel:
    """A made-up model for a Runner: it always has the same op table and program."""

    table: OpTable
    program: Program
    max_context: int
    store: WeightStore = field(default_factory=WeightStore)

    def backend(self, swaps: Mapping[str, str] | None, base: str) -> OpTable:
        """The op table."""
        return self.table

    def rewritten(self, backend: OpTable, fused: bool) -> Program:
        """The program."""
        return self.program


def digests(table: OpTable) -> list[tuple[Operands, str, str]]:
    """[(op, tensor name, digest)] of all outputs of the ops after the logits, on an op table."""
    with contextlib.closing(Team(1)) as team:
        runner = Runner(probe_model(table), team, Limits(ROWS, 1, 1, ROWS), keep=True)
        wishes = [SamplingParams(**w) for w in WISHES]
        adjustments = [Adjustment(SEEN, w, frozenset({0, 9}), VOCABULARY) for w in wishes]
        sampled = {r: record(r, w, a) for r, (w, a) in enumerate(zip(wishes, adjustments, strict=True))}
        sampled[0]["given"] = 1 + 4099
        runner.step([Span(list(range(ROWS)), 0, everywhere([0]), 0, sampled)])
        ops = [op for op in runner.program.ops if isinstance(op, (AdjustLogits, Sample))]
        written = [(op, t) for op in ops for t in op.shared]
        return [(op, t.name, digest(runner.executor.view(t, ROWS), t)) for op, t in written]


def probe_model(table: OpTable) -> ProbeModel:
    """The model of this probe, for a Runner; its logits are the rows of a made-up table."""
    values = np.random.RandomState(5).randint(-4096, 4096, (ROWS, WIDTH)) * np.float32(2.0**-9)
    program = Program()
    rows = rows_of(program, NAME, values.astype(np.float32))
    logits = program.tensor("logits", "R", WIDTH)
    program.emit(SelectRows(out=logits, x=rows, width=WIDTH, selected=selected_rows("R")))
    emit_sampling(program, logits, VOCABULARY)
    return ProbeModel(table, program, ROWS)


def record(row: int, p: SamplingParams, adjustment: Adjustment) -> dict[str, Any]:
    """The fields of a row's SAMPLING_RECORD for its SamplingParams."""
    return dict(
        temperature=p.temperature,
        top_p=p.top_p,
        min_p=p.min_p,
        top_k=p.top_k,
        seed=row,
        position=row + 1,
        num_logprobs=p.logprobs or 0,
        **adjustment.rows(SEEN[:3])[0],
    )


def digest(array: np.ndarray, tensor: Tensor) -> str:
    """The digest of a tensor without the padding of its rows, which may hold anything."""
    width = VOCABULARY if tensor.width == WIDTH else tensor.width
    return hashlib.sha256(np.ascontiguousarray(array[:, :width]).tobytes()).hexdigest()[:16]
