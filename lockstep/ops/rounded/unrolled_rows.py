"""Small steps between grids: the definition.

`rounded_inputs` and `rounded_silu_mul` taken apart, an op for each intermediate that hardware keeps; see `ptq.unroll`.
Every row is a token's; tensors of several heads or projections are read and written by columns.
"""

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.ops.attention.attention import gated
from lockstep.ops.math import sigmoid
from lockstep.ops.rounded.inputs import doubled, swapped_halves
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows, table
from lockstep.runtime.program import Table, Tensor
from lockstep.runtime.step import StepBlock, entry, num_rows


class Columns(Operands):
    """Columns out_column on of out = columns x_column on of x, `width` of them. Other columns of out stay."""

    group = "elementwise"
    rules = ("x_column + width <= x_width", "out_column + width <= out_width")
    out: Tensor = output("out_width")
    x: Tensor = rows("x_width")
    width: int
    x_width: int
    x_column: int
    out_width: int
    out_column: int


class RopeRows(Operands):
    """out = the table's values of each token's position twice, the first half negated if `negated`."""

    group = "elementwise"
    out: Tensor = output("2 * half")
    values: Table = table("half")
    half: int
    negated: bool


class SwapHalves(Operands):
    """out = (-x2, x1), or (x2, x1) where the table of sines has a negated first half."""

    group = "elementwise"
    out: Tensor = output("2 * half")
    x1: Tensor = rows("half")
    x2: Tensor = rows("half")
    half: int
    pre_negated: bool


class Multiply(Operands):
    """out = columns x_column on of x, times columns y_column on of y, `width` of them."""

    group = "elementwise"
    rules = ("x_column + width <= x_width", "y_column + width <= y_width")
    out: Tensor = output("width")
    x: Tensor = rows("x_width")
    y: Tensor = rows("y_width")
    width: int
    x_width: int
    x_column: int
    y_width: int
    y_column: int

    def flops(self, context):
        return self.width


class Sigmoid(Operands):
    """out = sigmoid of columns x_column on of x, `width` of them."""

    group = "elementwise"
    rules = ("x_column + width <= x_width",)
    out: Tensor = output("width")
    x: Tensor = rows("x_width")
    width: int
    x_width: int
    x_column: int

    def flops(self, context):
        return 3 * self.width


class GateRows(Operands):
    """out = x times sigmoid of columns gate_column on of gate; 0 for results near the smallest float32."""

    group = "elementwise"
    rules = ("width % 16 == 0", "gate_column + width <= gate_width")
    out: Tensor = output("width")
    x: Tensor = rows("width")
    gate: Tensor = rows("gate_width")
    width: int
    gate_width: int
    gate_column: int

    def flops(self, context):
        return 4 * self.width


@definition
def multiplied(x_D, y_D, out_D):
    """out = x * y.

    Shapes: x, y, out [D] float32.
    Error: half an ulp.
    Order: none.
    """
    for i in range(out_D.size):
        out_D[i] = x_D[i] * y_D[i]


@definition
def sigmoids(x_D, out_D):
    """out = 1 / (1 + e**-x): `sigmoid` of `math`.

    Shapes: x, out [D] float32.
    """
    for i in range(out_D.size):
        out_D[i] = sigmoid(x_D[i])


@inlined
def row_of(array, width, t, column, num_columns):
    """num_columns columns, from `column` on, of row t of a tensor at an address."""
    return carray(float_array(array + 4 * (width * t + column)), (num_columns,))


@kernel
def _columns(op, step, thread, num_threads):
    a = Columns.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        x_D = row_of(a.x, a.x_width, t, a.x_column, a.width)
        row_of(a.out, a.out_width, t, a.out_column, a.width)[:] = x_D


@kernel
def _rope_rows(op, step, thread, num_threads):
    a = RopeRows.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        values_R = row_of(a.values, a.half, entry(StepBlock.read(step).position, t), 0, a.half)
        doubled(values_R, a.negated, row_of(a.out, 2 * a.half, t, 0, 2 * a.half))


@kernel
def _swap_halves(op, step, thread, num_threads):
    a = SwapHalves.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        x1_R, x2_R = row_of(a.x1, a.half, t, 0, a.half), row_of(a.x2, a.half, t, 0, a.half)
        swapped_halves(x1_R, x2_R, a.pre_negated, row_of(a.out, 2 * a.half, t, 0, 2 * a.half))


@kernel
def _multiply(op, step, thread, num_threads):
    a = Multiply.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        x_D, y_D = row_of(a.x, a.x_width, t, a.x_column, a.width), row_of(a.y, a.y_width, t, a.y_column, a.width)
        multiplied(x_D, y_D, row_of(a.out, a.width, t, 0, a.width))


@kernel
def _sigmoid(op, step, thread, num_threads):
    a = Sigmoid.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        sigmoids(row_of(a.x, a.x_width, t, a.x_column, a.width), row_of(a.out, a.width, t, 0, a.width))


@kernel
def _gate_rows(op, step, thread, num_threads):
    a = GateRows.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        out_D = row_of(a.out, a.width, t, 0, a.width)
        out_D[:] = row_of(a.x, a.width, t, 0, a.width)
        gated(out_D, row_of(a.gate, a.gate_width, t, a.gate_column, a.width))


REFERENCE = {
    "columns": Implementation(_columns),
    "rope_rows": Implementation(_rope_rows),
    "swap_halves": Implementation(_swap_halves),
    "multiply": Implementation(_multiply),
    "sigmoid": Implementation(_sigmoid),
    "gate_rows": Implementation(_gate_rows),
}
