"""The head and the sampler alone, over rows whose last hidden states are known.

A receipt is verified by one prefill that computes hidden states in full steps; the few ops after the final norm then
run over the answer's rows, in blocks. Their memory is the Runner's own, which nobody reads between two steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.engine.model import Model
from lockstep.engine.runner import Runner
from lockstep.engine.step_arrays import StepArrays
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.rewrite import fuse, lower
from lockstep.ops.sampling.sample import Sample
from lockstep.runtime.executor import ALIGNMENT, Executor, aligned
from lockstep.runtime.program import Program, Tensor

BLOCK_ROWS = 64


def head_program(recorded: Program) -> tuple[Program, Tensor]:
    """The ops of a recorded program that follow from the final norm of the rows that sample, as a program of its own,
    and the tensor with these hidden states, float32 [R, D], which is given to it."""
    norms = [op for op in recorded.ops if isinstance(op, RmsNorm) and op.out.rows == "R"]
    assert len(norms) == 1, f"expected one final norm of the rows that sample, found {norms}"
    given, ops = norms[0].out, []
    known: set[Any] = {given}
    for op in recorded.ops:
        if op is not norms[0] and not known.isdisjoint(op.inputs):
            ops.append(op)
            known.update(op.outputs)
    program = recorded.rewritten(ops)
    program.caches, program.results, program.given = [], {}, [given]
    return program, given


class HeadBlocks:
    """The head and the sampler of a model, bound to the memory and threads of its Runner.

    rows: the most rows of a block. Only the engine's thread may `run` them, between two steps.
    """

    def __init__(self, model: Model, runner: Runner) -> None:
        program, given = head_program(model.recorded)
        backend = runner.executor.backend
        self._program = fuse(lower(program), backend)
        self.rows = min(BLOCK_ROWS, runner.limits.max_sampled)
        size = 4 * self.rows * given.width
        self._hidden = aligned(size + ALIGNMENT)[:size].view(np.float32).reshape(self.rows, given.width)
        logits, self._adjusted = (
            runner.executor.view(tensor, self.rows) for tensor in (runner.sample.logits, runner.sample.adjusted)
        )
        elsewhere = {
            given: self._hidden.ctypes.data,
            runner.sample.logits: logits.ctypes.data,
            runner.sample.adjusted: self._adjusted.ctypes.data,
        }
        rows = {"T": self.rows, "O": self.rows, "R": self.rows, "E": 0, "S": 1}
        self._executor = Executor(self._program, backend, runner.team, model.store, rows, {}, elsewhere=elsewhere)
        self._step = StepArrays(rows, 1)
        [sample] = [op for op in self._program.ops if isinstance(op, Sample)]
        self._sampled = [self._executor.view(tensor, self.rows)[:, 0] for tensor in (sample.token, sample.logprob)]

    def run(self, hidden_ED: np.ndarray, records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """The token that each row chooses, int32 [E], and its log-probability, float32 [E]; of a row with `given`, the
        log-probability of that token. Views that the next call overwrites.

        hidden_ED: float32 [E, D], E <= rows. records: the fields of each row's SAMPLING_RECORD.
        """
        num_rows = len(hidden_ED)
        self._hidden[:num_rows] = hidden_ED
        for row, fields in enumerate(records):
            self._step.set_record(row, fields)
        self._step.set_counts(num_tokens=num_rows, num_sampled=num_rows, num_outputs=num_rows)
        self._executor.run(self._step.block)
        token, logprob = self._sampled
        return token[:num_rows], logprob[:num_rows]

    def is_forbidden(self, row: int, token: int) -> bool:
        """Whether a row of the last block forbids a token; one is chosen only where every token is forbidden."""
        is_adjusted = self._step.records["adjustment"][row] != 0
        return bool(is_adjusted and np.isneginf(self._adjusted[row, token]))
