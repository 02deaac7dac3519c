"""The product of an activated gate and a value: the definition.

out[t, i] = activation(x[t, i]) * x[t, F + i]
"""

from lockstep.native.kernel import variant
from lockstep.native.numbers import float32
from lockstep.native.simd import peek, poke
from lockstep.ops.elementwise.activations import Preparable
from lockstep.ops.elementwise.gates import GATES
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows

GATE = None  # constant of a variant: one of GATES


class GatedMul(Preparable):
    """out = activation(first half of x) * second half; x [rows, 2 width], out [rows, width] or prepared.

    activation: one of GATES, which state their order of arithmetic. The op's kind is named after it: silu_mul.
    """

    group = "elementwise"
    x: Tensor = rows("2 * width")
    activation: str

    @property
    def own_kind(self):
        return f"{self.activation}_mul"

    def check(self):
        check_gate(self)
        super().check()

    def flops(self, context):
        return 4 * self.width


def check_gate(op) -> None:
    """ValueError if an op's activation is not one of GATES."""
    if op.activation not in GATES:
        allowed = ", ".join(map(repr, GATES))
        raise ValueError(f"{type(op).__name__}: activation is {op.activation!r}, expected one of {allowed}")


def _multiply(op, step, thread, num_threads):
    a = GatedMul.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        for i in range(a.width):
            gate = a.x + 4 * (2 * a.width * t + i)
            poke(a.out + 4 * (a.width * t + i), GATE(peek(gate, float32), peek(gate + 4 * a.width, float32)))


REFERENCE = {}
for _name, _gate in GATES.items():
    globals()[f"_{_name}_mul"] = variant(_multiply, f"_{_name}_mul", GATE=_gate)
    REFERENCE[f"{_name}_mul"] = Implementation(globals()[f"_{_name}_mul"])
