"""A rig: a model's programs with a score for every token, whose grids and weights change between runs.

Everything is recorded, compiled and allocated once. A trial writes its grids into the memory that kernels read, and
replaces weights by rounded ones; a window of text then runs as one step. A run may begin at a later layer if the input
of this layer was kept from a run with the same grids and weights before it: the bits are the same.

Which linear layers multiply integers is part of a program. So there is a program for each choice of integer layers,
made when a trial first needs it; all trials with this choice share it, whatever their grids.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lockstep.engine.model import Model
from lockstep.ptq.folded import FoldedStore, FoldedWeights, with_weight
from lockstep.ptq.integer import INTEGER, LinearLayers
from lockstep.ptq.noise import decibels
from lockstep.ptq.rewrite import Rounded, Treatment, rounded
from lockstep.ptq.spec import Spec
from lockstep.runtime.backend import OpTable
from lockstep.runtime.executor import tensors_between
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor, Weight
from lockstep.runtime.threads import Team
from lockstep.study.scoring.bound import Bindings, Bound

MAX_PROGRAMS = 8  # with integer layers, each with the weights that it read last; the least recently used goes first


class Rig:
    """A model whose windows of text are scored under changing grids.

    model: with float32 weights if weights are to be rounded. treatment: which sites can have grids. length: of a
    window, in tokens. change: rewrites the rounded program, such as `ptq.unroll.unroll`. table: the op table. keep:
    give every tensor memory of its own, so that all can be read after a run. compares: whether scores compare a window
    with the hidden states of a base model, which takes a second head.

    layers: which linear layers can multiply integers, and why others cannot.
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
        self.layers = LinearLayers(self.rounded)
        self.store = FoldedStore(model.store)
        self._change, self._folded = change, FoldedWeights(self.rounded.weights)
        self._bindings = Bindings(model, self.store, team, length, table, keep, compares)
        self._in_floats = self._now = self._bound(self.rounded.program)
        self._in_integers: OrderedDict[tuple[str, ...], Bound] = OrderedDict()
        self.num_tokens = 0

    def _bound(self, program: Program) -> Bound:
        changed = self._change(replace(self.rounded, program=program)) if self._change else program
        return self._bindings.bind(changed, self.rounded.grids)

    @property
    def program(self) -> Program:
        """The program that the rig runs for the current plan."""
        return self._now.program

    @property
    def score_index(self) -> int:
        """The index of its Score op."""
        return self._now.score_index

    @property
    def layer_starts(self) -> list[int]:
        """The index of the first op of every decoder layer, in order."""
        return self._now.layer_starts

    @property
    def num_programs(self) -> int:
        """How many programs were made."""
        return self._bindings.num_bound

    # ------------------------------------------------------------ grids and weights

    def set_grids(self, grids: Mapping[str, np.ndarray]) -> None:
        """Gives sites their grids, float32 [heads or 1, GRID_WORDS]; sites that are not named are not rounded."""
        for name, rows in self.rounded.grids.items():
            rows[...] = grids.get(name, 0)

    def set_weights(self, specs: Mapping[str, Spec], arithmetic: str = "float") -> None:
        """Rounds weights, by site; weights that are not named stay as in the model. ValueError for weights that are not
        multiplied as float32.

        arithmetic: of a plan. "integer": linear layers multiply integers wherever the specs of their weights and
        inputs allow it.
        """
        self._now = self._chosen(specs) if arithmetic == INTEGER else self._in_floats
        for weight, places in self._now.places.items():
            made = self._folded.like(weight, specs)
            for index, name in places:
                op = self.program.ops[index]
                if getattr(op, name) is not made:
                    self._now.executor.change(index, with_weight(op, name, made))

    def weight_noise(self, specs: Mapping[str, Spec]) -> dict[str, float | None]:
        """{site: signal to quantization noise in decibels, None without noise} of the rounded weights. specs: those
        that were set last."""
        made = {}
        for name, parts in self.rounded.weights.items():
            spec = specs.get(name)
            if spec is not None and not spec.is_off:
                keys = {(part.weight.parts[part.index].name, str(spec)) for part in parts}
                made[name] = decibels(*map(sum, zip(*(self.store.noise[key] for key in sorted(keys)), strict=True)))
        return made

    def _chosen(self, specs: Mapping[str, Spec]) -> Bound:
        """The program in which all layers that can be integer under specs are."""
        choice, made = self.layers.choose(specs), self._in_integers
        if not choice.layers:
            return self._in_floats
        if choice.layers not in made:
            while len(made) >= MAX_PROGRAMS:
                made.popitem(last=False)
            made[choice.layers] = self._bound(self.layers.program(choice, self._folded, specs))
        made.move_to_end(choice.layers)
        return made[choice.layers]

    # ------------------------------------------------------------ runs

    def load(self, ids: Sequence[int], targets: Sequence[int], base: np.ndarray | None = None) -> None:
        """Makes a window ready.

        targets: the token after each token, -1 for none. base: hidden states [len(ids), width] of the base model; None:
        those that were loaded last.
        """
        self.num_tokens = len(ids)
        self._bindings.targets[: len(ids)] = targets
        if base is not None:
            bytes_of = np.ascontiguousarray(base, np.float32).view(np.uint8).reshape(-1)
            self._bindings.base[: base.nbytes] = bytes_of
        self._step = self._bindings.prepare(ids)

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Runs the ops first .. last on the window."""
        self._now.executor.run(self._step, None, first, last)

    def view(self, tensor: Tensor) -> np.ndarray:
        """A tensor's rows, in the program's own memory."""
        return self._now.executor.view(tensor, self.num_tokens)

    def hidden(self) -> np.ndarray:
        """The hidden states that the head reads, [tokens, width]: a copy."""
        return self.view(self.program.results["hidden"]).copy()

    def scores(self) -> np.ndarray:
        """Scores of the last run, float32 [tokens, NUM_SCORES], see `ops/sampling/score.py`: a copy."""
        return self.view(self.program.ops[self.score_index].out).copy()

    def state(self, index: int) -> dict[Tensor, np.ndarray]:
        """Copies of the tensors that ops before an index write and ops from it on read."""
        return {tensor: self.view(tensor).copy() for tensor in tensors_between(self.program, index)}

    def restore(self, index: int, state: Mapping[Tensor, np.ndarray]) -> None:
        """Writes a state of `state` back; it may come from another program with the same ops before the index."""
        for tensor in tensors_between(self.program, index):
            self.view(tensor)[...] = state[tensor]

    def prefixes(self) -> list[bytes]:
        """For every layer start, a digest of all ops before it with their grids and weights."""
        digest, made, at = hashlib.sha256(), [], 0
        for start in self.layer_starts:
            for op in self.program.ops[at:start]:
                digest.update(_configuration(op))
            made.append(digest.digest())
            at = start
        return made


def _configuration(op: Operands) -> bytes:
    """The kind of an op, its grids and the names of its weights, as bytes."""
    parts = [op.kind.encode()]
    for name, _ in op.declared():
        value = getattr(op, name)
        if isinstance(value, Setting):
            parts.append(value.values.tobytes())
        elif isinstance(value, Weight):
            parts.append(value.name.encode())
    return b"\0".join(parts) + b"\1"
