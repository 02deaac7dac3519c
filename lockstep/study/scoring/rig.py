"""A model on the test bench: programs with a score for every token, whose grids and weights change between runs.

Everything is recorded, compiled and allocated once. A trial writes grids where the program's kernels find them, and
puts rounded weights in the place of others; a window of text then runs as one step. A run may begin at a later layer
where an earlier run with the same grids before it has left what that layer reads: the bits are the same.

Which linear layers multiply integers is part of a program, so there is one for each such choice, made when a trial
first has it: all trials with the same choice, whatever their grids, have one program.
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

NO_TARGET = -1  # of a row after which no token is known
# with layers in integers, beside that in floats: those used last stay, each with the weights that it read last
MOST_PROGRAMS = 8


class Rig:
    """A model whose windows of text are scored under changing grids.

    model: with float32 weights where weights are to be rounded. treatment: which sites have grids at all. length: of a
    window, in tokens. change: makes another program of it, such as `ptq.unroll.unroll` of its own. table: the op table.
    keep: give every tensor memory of its own, so that all can be looked at after a run. compares: whether scores tell
    how far a window is from another model's hidden states, which takes another head.

    layers: which linear layers can be in integers, and why others cannot.
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
        """The program that runs now."""
        return self._now.program

    @property
    def score_index(self) -> int:
        """The index of its op that scores."""
        return self._now.score_index

    @property
    def layer_starts(self) -> list[int]:
        """The index of the first op of every decoder layer, in order."""
        return self._now.layer_starts

    @property
    def num_programs(self) -> int:
        """How many programs were made."""
        return self._bindings.num_bound

    # ------------------------------------------------------------ what is rounded

    def set_grids(self, grids: Mapping[str, np.ndarray]) -> None:
        """Gives sites their grids, float32 [heads or 1, GRID_WORDS]; sites that are not named are not rounded."""
        for name, rows in self.rounded.grids.items():
            rows[...] = grids.get(name, 0)

    def set_weights(self, specs: Mapping[str, Spec], arithmetic: str = "float") -> None:
        """Rounds weights, by site; those that are not named are as the model has them. ValueError for weights that are
        not multiplied as float32.

        arithmetic: of a plan. "integer": linear layers multiply integers wherever specs, of weights and of what they
        are multiplied with, allow it.
        """
        self._now = self._chosen(specs) if arithmetic == INTEGER else self._in_floats
        for weight, places in self._now.places.items():
            made = self._folded.like(weight, specs)
            for index, name in places:
                op = self.program.ops[index]
                if getattr(op, name) is not made:
                    self._now.executor.change(index, with_weight(op, name, made))

    def weight_noise(self, specs: Mapping[str, Spec]) -> dict[str, float | None]:
        """{site: signal to quantization noise in decibels, None if there is no noise} of the weights that are rounded
        now, under the specs that were set."""
        made = {}
        for name, parts in self.rounded.weights.items():
            spec = specs.get(name)
            if spec is not None and not spec.is_off:
                keys = {(part.weight.parts[part.index].name, str(spec)) for part in parts}
                made[name] = decibels(*map(sum, zip(*(self.store.noise[key] for key in sorted(keys)), strict=True)))
        return made

    def _chosen(self, specs: Mapping[str, Spec]) -> Bound:
        """The program for the layers that can be integer."""
        choice, made = self.layers.choose(specs), self._in_integers
        if not choice.layers:
            return self._in_floats
        if choice.layers not in made:
            while len(made) >= MOST_PROGRAMS:
                made.popitem(last=False)
            made[choice.layers] = self._bound(self.layers.program(choice, self._folded, specs))
        made.move_to_end(choice.layers)
        return made[choice.layers]

    # ------------------------------------------------------------ runs

    def load(self, ids: Sequence[int], targets: Sequence[int], base: np.ndarray | None = None) -> None:
        """Makes a window ready.

        targets: the token after each, -1 for none. base: hidden states [len(ids), width] of the model that is compared
        with; None: those of the window before.
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
        """Scores of the last run, float32 [tokens, NUM_SCORES], see `ops.score.scores`: a copy."""
        return self.view(self.program.ops[self.score_index].out).copy()

    def state(self, index: int) -> dict[Tensor, np.ndarray]:
        """What the ops from an index on read of those before: copies."""
        return {tensor: self.view(tensor).copy() for tensor in tensors_between(self.program, index)}

    def restore(self, index: int, state: Mapping[Tensor, np.ndarray]) -> None:
        """Puts such a state back, which another program may have left that is the same before the index."""
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
    """The kind of an op, and what of it a trial may change, as bytes."""
    parts = [op.kind.encode()]
    for name, _ in op.declared():
        value = getattr(op, name)
        if isinstance(value, Setting):
            parts.append(value.values.tobytes())
        elif isinstance(value, Weight):
            parts.append(value.name.encode())
    return b"\0".join(parts) + b"\1"
