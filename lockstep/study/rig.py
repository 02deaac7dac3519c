"""A model on the test bench: one program with a score for every token, whose grids and weights change between runs.

Everything is recorded, compiled and allocated once. A trial writes grids where the program's kernels find them, and
puts rounded weights in the place of others; a window of text then runs as one step. A run may begin at a later layer
where an earlier run with the same grids before it has left what that layer reads: the bits are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lockstep.engine.model import Model
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.ops import BACKENDS
from lockstep.ops.code_linear import CodeLinear
from lockstep.ops.code_rows import CodeRows, row_width
from lockstep.ops.kv_cache import PAGE_TOKENS
from lockstep.ops.linear import Linear
from lockstep.ops.rewrite import fuse, lower
from lockstep.ops.score import NUM_SCORES, Score, scratch_width
from lockstep.ptq.folded import FoldedStore, FoldedWeights, with_weight
from lockstep.ptq.rewrite import Rounded, Treatment, layer_of, rounded
from lockstep.ptq.spec import Spec
from lockstep.runtime.backend import OpTable
from lockstep.runtime.executor import WeightStore, aligned, tensors_between
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor, Weight
from lockstep.runtime.threads import Team

NO_TARGET = -1  # of a row after which no token is known


class Rig:
    """A model whose windows of text are scored under changing grids.

    model: with float32 weights where weights are to be rounded. treatment: which sites have grids at all. length: of a
    window, in tokens. change: makes another program of it, such as `ptq.unroll.unroll` of its own. table: the op table.
    keep: give every tensor memory of its own, so that all can be looked at after a run. compares: whether scores tell
    how far a window is from another model's hidden states, which takes another head.
    """

    def __init__(
        self,
        model: Model,
        treatment: Treatment,
        team: Team,
        length: int,
        change: Callable[[Rounded], Program] | None = None,
        table: OpTable | None = None,
        *,
        keep: bool = False,
        compares: bool = True,
    ) -> None:
        self.model, self.length = model, length
        self.rounded: Rounded = rounded(model.recorded, treatment)
        program = change(self.rounded) if change else self.rounded.program
        score = self._scored(program, compares)
        self._targets, self._base = (
            aligned(4 * length + 64).view(np.int32),
            aligned(4 * length * score.in_features + 64),
        )
        given = {score.target: self._targets.ctypes.data}
        if score.base_x is not None:
            given[score.base_x] = self._base.ctypes.data
        pages = -(-length // PAGE_TOKENS)
        self.store = FoldedStore(model.store)
        table = table or {**BACKENDS["reference"], **BACKENDS["cpu"]}
        runnable = _Runnable(self.store, model.max_context, self._program, table)
        self._runner = Runner(runnable, team, Limits(length, 1, pages, 1), elsewhere=given, keep=keep)
        self._executor, self._pages = self._runner.executor, list(range(pages))
        self.program: Program = self._executor.program
        [self.score_index] = [i for i, op in enumerate(self.program.ops) if isinstance(op, Score)]
        self._places = _places(self.program)
        self.layer_starts = layer_starts(self.program)
        self._folded = FoldedWeights(self.rounded.weights)
        self.num_tokens = 0

    def _scored(self, program: Program, compares: bool) -> Score:
        """Ends the program with a score; keeps it."""
        [head] = [op for op in program.ops if self.model.logits in op.outputs and isinstance(op, (Linear, CodeLinear))]
        [base] = [op for op in self.model.recorded.ops if isinstance(op, Linear) and op.out is self.model.logits]
        hidden, vocabulary = program.results["hidden"], self.model.config.vocab_size
        width, grids = scratch_width(vocabulary), self.rounded.grids.get("head")
        score = Score(
            out=program.tensor("score", hidden.rows, NUM_SCORES),
            scratch=program.tensor("score.scratch", hidden.rows, width),
            x=hidden if isinstance(head, Linear) else self._coded(program, hidden),
            weight=head.weight,
            target=program.give("score.target", hidden.rows, 1, "i32"),
            base_x=program.give("score.base", hidden.rows, hidden.width) if compares else None,
            base_weight=_same(base.weight) if compares else None,
            base_f32=compares and head.weight.format != base.weight.format,
            grid=None if grids is None else Setting("head", grids),
            in_features=hidden.width,
            vocab_size=vocabulary,
            scratch_width=width,
        )
        program.emit(score)
        self._program = program
        return score

    def _coded(self, program: Program, hidden: Tensor) -> Tensor:
        """The hidden states as codes, for a head in integer arithmetic."""
        out = program.tensor("score.codes", hidden.rows, row_width(hidden.width), "i8")
        grid = Setting("norm", self.rounded.grids["norm"])
        return program.emit(CodeRows(out=out, x=hidden, grid=grid, width=hidden.width))

    # ------------------------------------------------------------ what is rounded

    def set_grids(self, grids: Mapping[str, np.ndarray]) -> None:
        """Gives sites their grids, float32 [heads or 1, GRID_WORDS]; sites that are not named are not rounded."""
        for name, rows in self.rounded.grids.items():
            rows[...] = grids.get(name, 0)

    def set_weights(self, specs: Mapping[str, Spec]) -> None:
        """Rounds weights, by site; those that are not named are as the model has them. ValueError for weights that are
        not multiplied as float32."""
        for weight, places in self._places.items():
            made = self._folded.weight(weight, specs)
            for index, name in places:
                op = self.program.ops[index]
                if getattr(op, name) is not made:
                    self._executor.change(index, with_weight(op, name, made))

    # ------------------------------------------------------------ runs

    def load(self, ids: Sequence[int], targets: Sequence[int], base: np.ndarray | None = None) -> None:
        """Makes a window ready.

        targets: the token after each, -1 for none. base: hidden states [len(ids), width] of the model that is compared
        with; None: those of the window before.
        """
        self.num_tokens = len(ids)
        self._targets[: len(ids)] = targets
        if base is not None:
            self._base[: base.nbytes] = np.ascontiguousarray(base, np.float32).view(np.uint8).reshape(-1)
        span = Span(list(ids), 0, self._pages, 0, embedded=range(len(ids)))
        self._step = self._runner.prepare([span])

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Runs the ops first .. last on the window."""
        self._executor.run(self._step, None, first, last)

    def view(self, tensor: Tensor) -> np.ndarray:
        """A tensor's rows, in the rig's own memory."""
        return self._executor.view(tensor, self.num_tokens)

    def hidden(self) -> np.ndarray:
        """The hidden states that the head reads, [tokens, width]: a copy."""
        return self.view(self.program.results["hidden"]).copy()

    def scores(self) -> np.ndarray:
        """Scores of the last run, float32 [tokens, NUM_SCORES], see `ops.score.scores`: a copy."""
        return self.view(self.program.ops[self.score_index].out).copy()

    def state(self, index: int) -> list[np.ndarray]:
        """What the ops from an index on read of those before: copies."""
        return [self.view(tensor).copy() for tensor in tensors_between(self.program, index)]

    def restore(self, index: int, state: Sequence[np.ndarray]) -> None:
        """Puts such a state back."""
        for tensor, rows in zip(tensors_between(self.program, index), state, strict=True):
            self.view(tensor)[...] = rows

    def prefixes(self) -> list[bytes]:
        """For every layer start, a digest of the grids and weights of all ops before it."""
        digest, made, at = hashlib.sha256(), [], 0
        for start in self.layer_starts:
            for op in self.program.ops[at:start]:
                digest.update(_configuration(op))
            made.append(digest.digest())
            at = start
        return made


class _Runnable:
    """A rounded program as a Runner wants it."""

    def __init__(self, store: WeightStore, max_context: int, program: Program, table: OpTable) -> None:
        self._store, self._max_context, self._program, self._table = store, max_context, program, table

    @property
    def store(self) -> WeightStore:
        return self._store

    @property
    def max_context(self) -> int:
        return self._max_context

    def backend(self, swaps: Mapping[str, str] | None, base: str) -> OpTable:
        return self._table

    def rewritten(self, backend: OpTable, fused: bool) -> Program:
        return fuse(lower(self._program), backend)


def _same(weight: Weight) -> Weight:
    """Another Weight with the same memory, which stays when the first is replaced."""
    return Weight(weight.name, weight.format, weight.shape, weight.parts)


def _places(program: Program) -> dict[Weight, list[tuple[int, str]]]:
    """{weight: (index of an op that reads it, its operand's name), ...}."""
    found: dict[Weight, list[tuple[int, str]]] = {}
    for index, op in enumerate(program.ops):
        for name, operand in op.declared():
            if operand.role in ("constant", "packed") and getattr(op, name) is not None:
                found.setdefault(getattr(op, name), []).append((index, name))
    return found


def layer_starts(program: Program) -> list[int]:
    """The index of the first op of every decoder layer, in order."""
    starts: dict[int, int] = {}
    for index, op in enumerate(program.ops):
        layer = layer_of(op.outputs[0].name) if op.outputs else None
        if layer is not None:
            starts.setdefault(layer, index)
    return [starts[layer] for layer in sorted(starts)]


def _configuration(op: Operands) -> bytes:
    """What of an op a trial may change, as bytes."""
    parts = []
    for name, _ in op.declared():
        value = getattr(op, name)
        if isinstance(value, Setting):
            parts.append(value.values.tobytes())
        elif isinstance(value, Weight):
            parts.append(value.name.encode())
    return b"\0".join(parts) + b"\1"
