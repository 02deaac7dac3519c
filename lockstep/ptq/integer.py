"""Putting linear layers of a rounded program into integer arithmetic, where there are kernels for their grids.

A layer qualifies if its input lies on one integer grid for the whole tensor, found before the model runs, and its
weights lie on integer grids of at most 8 bits, one for each row or one for all. It then multiplies codes; see
`ops/integer/code_linear.py`. Other layers stay in float arithmetic and are listed with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.ops.elementwise.select_rows import SelectRows
from lockstep.ops.integer.code_linear import MOST_VALUES, CodeLinear
from lockstep.ops.integer.code_rows import CodeRows, row_width
from lockstep.ops.linear.linear import Linear
from lockstep.ops.rounded.fake_quant import FakeQuant
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from lockstep.ptq.folded import FoldedWeights
from lockstep.ptq.rewrite import Rounded
from lockstep.ptq.spec import Spec
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor, Weight

INTEGER = "integer"  # a value of `Plan.arithmetic`
MAX_WEIGHT_BITS, OFF = 8, Spec("off")


@dataclass(frozen=True)
class Choice:
    """Which linear layers of a rounded program multiply integers. A layer is named by the site of its first weight.

    layers: the names of those that do, in order. floats: {name: reason} of those that do not.
    """

    layers: tuple[str, ...]
    floats: Mapping[str, str]


@dataclass(frozen=True)
class Integers(Choice):
    """A choice, and the program with the chosen layers in integer arithmetic."""

    program: Program


def integers(rounded: Rounded, specs: Mapping[str, Spec]) -> Integers:
    """The rounded program with every layer that qualifies in integer arithmetic. specs: {site: Spec}."""
    layers = LinearLayers(rounded)
    choice = layers.choose(specs)
    program = layers.program(choice, FoldedWeights(rounded.weights), specs)
    return Integers(choice.layers, choice.floats, program)


@dataclass(frozen=True)
class _Layer:
    """A linear layer. names: the sites of its weight's parts. site, grid: of its input, if the whole input lies on one
    grid."""

    op: Linear
    names: tuple[str, ...]
    site: str = ""
    grid: Setting | None = None

    def reason(self, specs: Mapping[str, Spec]) -> str:
        """Why the layer does not qualify under specs; empty if it does."""
        if self.grid is None:
            return f"its input, {self.op.x.name}, has no grid"
        spec = specs.get(self.site, OFF)
        if not spec.what.is_integer or spec.per != "tensor":
            return f"its input, {self.site}, is {spec}, no integer grid of a tensor"
        reason = next(filter(None, (_weight_reason(name, specs.get(name, OFF)) for name in self.names)), "")
        if reason:
            return reason
        return "" if self.op.in_features <= MOST_VALUES else f"it has rows of {self.op.in_features} numbers"


class LinearLayers:
    """The linear layers of a rounded program, and programs with some of them in integer arithmetic.

    Such a program depends only on the choice of layers: grids of inputs are read as it runs, and its weights may be
    replaced.
    """

    def __init__(self, rounded: Rounded) -> None:
        self._program = rounded.program
        self._of_memory = {rows.ctypes.data: name for name, rows in rounded.grids.items()}
        sites = {(part.weight, part.index): name for name, parts in rounded.weights.items() for part in parts}
        grids: dict[Tensor, tuple[str, Setting]] = {}  # tensors that lie on one grid: (its site, the grid)
        self._layers: dict[Operands, _Layer] = {}
        self._codes: dict[Tensor, Tensor] = {}  # input -> its codes, shared by all programs
        for op in rounded.program.ops:
            if isinstance(op, Linear):
                names = tuple(sites[op.weight, i] for i in range(len(op.weight.parts)))
                self._layers[op] = _Layer(op, names, *grids.get(op.x, ("", None)))
            for tensor in op.outputs:
                grids.pop(tensor, None)
            grids.update(self._on_one_grid(op, grids))

    def _on_one_grid(
        self, op: Operands, grids: Mapping[Tensor, tuple[str, Setting]]
    ) -> dict[Tensor, tuple[str, Setting]]:
        """The outputs of an op that lie on one grid: {tensor: (site, grid)}."""
        if isinstance(op, FakeQuant) and op.stride == op.head_width and op.num_heads * op.head_width == op.width:
            return {op.out: (op.grids.name, Setting(op.grids.name, op.grids.values[:1]))}
        if isinstance(op, SelectRows) and op.x in grids:
            return {op.out: grids[op.x]}
        if isinstance(op, RoundedSiluMul):
            last = Setting(f"{op.grids.name}.mul", op.grids.values[2:3])
            name = self._of_memory.get(last.values.ctypes.data)
            return {op.out: (name, last)} if name else {}
        return {}

    def choose(self, specs: Mapping[str, Spec]) -> Choice:
        """The choice of every layer that qualifies. specs: {site: Spec}."""
        reasons = {layer.names[0]: layer.reason(specs) for layer in self._layers.values()}
        layers = tuple(name for name, reason in reasons.items() if not reason)
        return Choice(layers, {name: reason for name, reason in reasons.items() if reason})

    def program(self, choice: Choice, weights: FoldedWeights, specs: Mapping[str, Spec]) -> Program:
        """The program with the chosen layers in integer arithmetic. specs: {site: Spec} of the codes of their
        weights."""
        ops: list[Operands] = []
        codes: dict[Tensor, Tensor] = {}
        chosen = {*choice.layers}
        for op in self._program.ops:
            layer = self._layers.get(op)
            if layer is not None and layer.names[0] in chosen:
                if layer.op.x not in codes:
                    ops.append(self._coding(layer))
                    codes[layer.op.x] = ops[-1].outputs[0]
                op = _in_codes(layer.op, codes[layer.op.x], weights.codes(layer.op.weight, specs))
            for tensor in op.outputs:
                codes.pop(tensor, None)
            ops.append(op)
        return self._program.rewritten(ops)

    def _coding(self, layer: _Layer) -> CodeRows:
        """The op that turns a layer's input into codes."""
        x, width = layer.op.x, layer.op.in_features
        assert layer.grid is not None, layer
        if x not in self._codes:
            self._codes[x] = self._program.tensor(f"{x.name}.codes", x.rows, row_width(width), "i8")
        return CodeRows(out=self._codes[x], x=x, grid=layer.grid, width=width)


def _in_codes(op: Linear, x: Tensor, weight: Weight) -> CodeLinear:
    """The linear layer as an op that multiplies codes."""
    sizes = dict(in_features=op.in_features, out_features=op.out_features, width=op.width, column=op.column)
    return CodeLinear(out=op.out, x=x, weight=weight, **sizes)


def _weight_reason(name: str, spec: Spec) -> str:
    if not spec.what.is_integer or spec.bits > MAX_WEIGHT_BITS:
        return f"{name} is {spec}, no integers of at most {MAX_WEIGHT_BITS} bits"
    return f"{name} is {spec}, integers in groups of columns" if isinstance(spec.per, int) else ""
