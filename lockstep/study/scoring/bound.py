"""Programs of a rig, each with a score for every token; they share one cache, one step block and one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.engine.cache.pages import everywhere, pages_for
from lockstep.engine.model import Model
from lockstep.engine.runner import Limits, Runner, Span
from lockstep.ops import BACKENDS
from lockstep.ops.integer.code_linear import CodeLinear
from lockstep.ops.integer.code_rows import CodeRows, row_width
from lockstep.ops.linear.linear import Linear
from lockstep.ops.rewrite import fuse, lower
from lockstep.ops.sampling.score import NUM_SCORES, Score, scratch_width
from lockstep.ptq.rewrite import layer_of
from lockstep.runtime.backend import OpTable
from lockstep.runtime.executor import Executor, aligned
from lockstep.runtime.program import Program, Setting, Tensor, Weight
from lockstep.runtime.threads import Team
from lockstep.weights.store import WeightStore


@dataclass(frozen=True)
class Bound:
    """A program that is ready to run. score_index: the index of its Score op. layer_starts: the index of the first op
    of every decoder layer, in order. places: {weight: [(index of an op that reads it, operand's name), ...]} of the
    weights with which the program was made."""

    program: Program
    executor: Executor
    score_index: int
    layer_starts: list[int]
    places: Mapping[Weight, list[tuple[int, str]]]

    @staticmethod
    def of(executor: Executor) -> Bound:
        """An executor with its program."""
        program = executor.program
        [score] = [i for i, op in enumerate(program.ops) if isinstance(op, Score)]
        return Bound(program, executor, score, layer_starts(program), _places(program))


class Bindings:
    """Makes programs of a model ready to run on windows of `length` tokens; see `Rig`.

    targets int32 [length], base float32 [length, width]: the targets of a window, and the hidden states of the model
    that it is compared with. num_bound: how many programs were made.
    """

    def __init__(
        self,
        model: Model,
        store: WeightStore,
        team: Team,
        length: int,
        table: OpTable | None,
        keep: bool,
        compares: bool,
    ) -> None:
        self._model, self._store, self._team, self._length = model, store, team, length
        self._table = table or {**BACKENDS["reference"], **BACKENDS["cpu"]}
        self._keep, self._compares = keep, compares
        if model.config.logit_cap:
            raise ValueError(f"studies of models whose logits are capped ({model.config.model_type}) are not supported")
        [self._head] = [op for op in model.recorded.ops if isinstance(op, Linear) and op.out is model.logits]
        self.targets = aligned(4 * length + 64).view(np.int32)
        self.base = aligned(4 * length * self._head.in_features + 64)
        self._pages = everywhere(range(pages_for(length)))
        self._runner: Runner | None = None
        self.num_bound = 0

    def bind(self, program: Program, grids: Mapping[str, np.ndarray]) -> Bound:
        """Makes a program ready to run, with a Score op at its end. grids: of its sites."""
        program = program.rewritten(program.ops)
        score = self._scored(program, grids)
        given = {score.target: self.targets.ctypes.data}
        if score.base_x is not None:
            given[score.base_x] = self.base.ctypes.data
        self.num_bound += 1
        if self._runner is None:
            self._runner = self._first(program, given)
            return Bound.of(self._runner.executor)
        caches = {name: array.ctypes.data for name, array in self._runner.caches.items()}
        rows, program = self._runner.executor.max_rows, fuse(lower(program), self._table)
        bound_to = self._table, self._team, self._store, rows, caches
        return Bound.of(Executor(program, *bound_to, keep_all=self._keep, elsewhere=given))

    def _first(self, program: Program, given: dict[Tensor, int]) -> Runner:
        """The runner of the first program; the other programs share its cache and step block."""
        runnable = _Runnable(self._store, self._model.max_context, program, self._table)
        limits = Limits(self._length, 1, pages_for(self._length), 1)
        return Runner(runnable, self._team, limits, elsewhere=given, keep=self._keep)

    def prepare(self, ids: Sequence[int]) -> np.ndarray:
        """The step block of a window, for all programs."""
        assert self._runner is not None
        return self._runner.prepare([Span(list(ids), 0, self._pages, 0, embedded=range(len(ids)))])

    def _scored(self, program: Program, grids: Mapping[str, np.ndarray]) -> Score:
        """Adds a Score op to the end of the program."""
        [head] = [op for op in program.ops if self._model.logits in op.outputs and isinstance(op, (Linear, CodeLinear))]
        hidden, vocabulary = program.results["hidden"], self._model.config.vocab_size
        width, compares, base = scratch_width(vocabulary), self._compares, self._head.weight
        score = Score(
            out=program.tensor("score", hidden.rows, NUM_SCORES),
            scratch=program.tensor("score.scratch", hidden.rows, width),
            x=hidden if isinstance(head, Linear) else _coded(program, hidden, grids),
            weight=head.weight,
            target=program.give("score.target", hidden.rows, 1, "i32"),
            base_x=program.give("score.base", hidden.rows, hidden.width) if compares else None,
            base_weight=_same(base) if compares else None,
            base_f32=compares and head.weight.format != base.format,
            grid=Setting("head", grids["head"]) if "head" in grids else None,
            in_features=hidden.width,
            vocab_size=vocabulary,
            scratch_width=width,
        )
        program.emit(score)
        return score


def _coded(program: Program, hidden: Tensor, grids: Mapping[str, np.ndarray]) -> Tensor:
    """The hidden states as codes, for a head in integer arithmetic."""
    out = program.tensor("score.codes", hidden.rows, row_width(hidden.width), "i8")
    return program.emit(CodeRows(out=out, x=hidden, grid=Setting("norm", grids["norm"]), width=hidden.width))


class _Runnable:
    """A program in the form that a Runner needs."""

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
    """Another Weight of the same tensor, which stays when the first is replaced by a rounded one."""
    return Weight(weight.name, weight.format, weight.shape, weight.parts)


def _places(program: Program) -> dict[Weight, list[tuple[int, str]]]:
    """{weight: [(index of an op that reads it, operand's name), ...]}."""
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
