"""Linear layers of a rounded program in integer arithmetic, where there are kernels for their grids.

A layer can be one whose input lies on one integer grid for the whole tensor, found before the model runs, and whose
weights lie on integer grids of at most 8 bits with a scale for each row or for all. Its input's codes are multiplied as
integers; see `ops/code_linear.py`. Others stay in float arithmetic, and are named with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lockstep.ops.code_linear import MOST_VALUES, CodeLinear
from lockstep.ops.code_rows import CodeRows, row_width
from lockstep.ops.code_weights import CodeTensor, code_tensor, code_weight
from lockstep.ops.fake_quant import FakeQuant
from lockstep.ops.linear import Linear
from lockstep.ops.rounded_silu_mul import RoundedSiluMul
from lockstep.ops.select_rows import SelectRows
from lockstep.ptq.rewrite import Rounded
from lockstep.ptq.spec import Spec
from lockstep.ptq.weights import fold
from lockstep.runtime.operands import Operands
from lockstep.runtime.program import Program, Setting, Tensor, Weight
from lockstep.weights.tensor import StoredTensor

MOST_WEIGHT_BITS, OFF = 8, Spec("off")


@dataclass
class Integers:
    """A program with layers in integer arithmetic, so many of them. floats: {site of a layer's first weight: why it is
    not one}."""

    program: Program
    num_layers: int = 0
    floats: dict[str, str] = field(default_factory=dict)


def integers(rounded: Rounded, specs: Mapping[str, Spec]) -> Integers:
    """The rounded program whose layers are integer wherever they can be, with weights as specs, by site, say."""
    return _Rewriter(rounded, specs).run()


def code_weight_of(weight: Weight, specs: Mapping[int, Spec]) -> Weight:
    """A weight as codes. specs: by part; they are in its name, by which packed weights are kept."""
    name = f"{weight.name} on {', '.join(str(specs[i]) for i in range(len(weight.parts)))}"
    return code_weight(name, *(_codes(part, specs[i]) for i, part in enumerate(weight.parts)))


def _codes(part: StoredTensor, spec: Spec) -> CodeTensor:
    made = fold(part.finite_f32().reshape(-1, part.shape[-1]), spec, part.name)
    assert made.codes is not None and made.scale is not None and made.zero is not None, spec
    return code_tensor(part.name, made.codes, made.scale, made.zero)


class _Rewriter:
    """One walk through a program, op after op."""

    def __init__(self, rounded: Rounded, specs: Mapping[str, Spec]) -> None:
        self._rounded, self._specs = rounded, specs
        self._ops: list[Operands] = []
        self._grids: dict[
            Tensor, tuple[str, Setting]
        ] = {}  # of tensors that lie on one grid: its site, and where it is
        self._codes: dict[Tensor, Tensor] = {}
        self._sites = {(part.weight, part.index): name for name, parts in rounded.weights.items() for part in parts}
        self.made = Integers(rounded.program)

    def run(self) -> Integers:
        for op in self._rounded.program.ops:
            self._forget(op)
            if isinstance(op, Linear):
                op = self._linear(op)
            self._ops.append(op)
            self._remember(op)
        self.made.program = self._rounded.program.rewritten(self._ops)
        return self.made

    def _forget(self, op: Operands) -> None:
        for tensor in op.outputs:
            self._grids.pop(tensor, None)
            self._codes.pop(tensor, None)

    def _remember(self, op: Operands) -> None:
        """Notes the tensors that lie on one grid after an op."""
        if isinstance(op, FakeQuant) and op.stride == op.head_width and op.num_heads * op.head_width == op.width:
            self._grids[op.out] = op.grids.name, Setting(op.grids.name, op.grids.values[:1])
        elif isinstance(op, SelectRows) and op.x in self._grids:
            self._grids[op.out] = self._grids[op.x]
        elif isinstance(op, RoundedSiluMul):
            last = Setting(f"{op.grids.name}.mul", op.grids.values[2:3])
            name = next(
                (n for n, rows in self._rounded.grids.items() if rows.ctypes.data == last.values.ctypes.data), ""
            )
            if name:
                self._grids[op.out] = name, last

    def _linear(self, op: Linear) -> Operands:
        names = [self._sites[op.weight, i] for i in range(len(op.weight.parts))]
        reason = self._reason(op, names)
        if reason:
            self.made.floats[names[0]] = reason
            return op
        self.made.num_layers += 1
        if op.x not in self._codes:
            coded = self._rounded.program.tensor(f"{op.x.name}.codes", op.x.rows, row_width(op.in_features), "i8")
            self._ops.append(CodeRows(out=coded, x=op.x, grid=self._grids[op.x][1], width=op.in_features))
            self._codes[op.x] = coded
        specs = {i: self._specs[name] for i, name in enumerate(names)}
        sizes = dict(in_features=op.in_features, out_features=op.out_features, width=op.width, column=op.column)
        return CodeLinear(out=op.out, x=self._codes[op.x], weight=code_weight_of(op.weight, specs), **sizes)

    def _reason(self, op: Linear, names: Sequence[str]) -> str:
        """Why a layer is not in integer arithmetic; nothing if it is."""
        if op.x not in self._grids:
            return f"its input, {op.x.name}, has no grid"
        site = self._grids[op.x][0]
        spec = self._specs.get(site, OFF)
        if not spec.what.is_integer or spec.per != "tensor":
            return f"its input, {site}, is {spec}, no integer grid of a tensor"
        reason = next(filter(None, (_weight_reason(name, self._specs.get(name, OFF)) for name in names)), "")
        if reason:
            return reason
        return "" if op.in_features <= MOST_VALUES else f"it has rows of {op.in_features} numbers"


def _weight_reason(name: str, spec: Spec) -> str:
    if not spec.what.is_integer or spec.bits > MOST_WEIGHT_BITS:
        return f"{name} is {spec}, no integers of at most {MOST_WEIGHT_BITS} bits"
    return f"{name} is {spec}, integers in groups of columns" if isinstance(spec.per, int) else ""
