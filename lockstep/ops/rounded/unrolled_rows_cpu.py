"""Small steps between grids: the fast kernels. Bound by memory; a thread has the same rows in every op."""

from lockstep.native.kernel import inlined, kernel
from lockstep.native.simd import load, store
from lockstep.ops.attention.formulas import cleared
from lockstep.ops.math import sigmoid
from lockstep.ops.rounded.inputs_cpu import double_row, swap_halves
from lockstep.ops.rounded.row_math_cpu import copy_row, multiply_rows, sigmoid_row
from lockstep.ops.rounded.unrolled_rows import Columns, GateRows, Multiply, RopeRows, Sigmoid, SwapHalves
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import StepBlock, entry, num_rows


@kernel
def columns(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = Columns.read(op)
    for t in range(thread, num_rows(op, step), num_threads):
        x, out = a.x + 4 * (a.x_width * t + a.x_column), a.out + 4 * (a.out_width * t + a.out_column)
        copy_row(x, a.width, out)


@kernel
def rope_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = RopeRows.read(op)
    for t in range(thread, num_rows(op, step), num_threads):
        values = a.values + 4 * a.half * entry(StepBlock.read(step).position, t)
        double_row(values, a.half, a.negated, a.out + 8 * a.half * t)


@kernel
def swapped(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = SwapHalves.read(op)
    for t in range(thread, num_rows(op, step), num_threads):
        row = 4 * a.half * t
        swap_halves(a.x1 + row, a.x2 + row, a.half, a.pre_negated, a.out + 2 * row)


@kernel
def multiply(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = Multiply.read(op)
    for t in range(thread, num_rows(op, step), num_threads):
        x, y = a.x + 4 * (a.x_width * t + a.x_column), a.y + 4 * (a.y_width * t + a.y_column)
        multiply_rows(x, y, a.width, a.out + 4 * a.width * t)


@kernel
def sigmoids(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = Sigmoid.read(op)
    for t in range(thread, num_rows(op, step), num_threads):
        sigmoid_row(a.x + 4 * (a.x_width * t + a.x_column), a.width, a.out + 4 * a.width * t)


@inlined
def gate_row(x, gate, num_values, out):
    """out = x * sigmoid(gate), for a multiple of 16 values: `attention.gated`."""
    for i in range(0, 4 * num_values, 64):
        store(out + i, cleared(load(x + i) * sigmoid(load(gate + i))))


@kernel
def gate_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = GateRows.read(op)
    for t in range(thread, num_rows(op, step), num_threads):
        gate, row = a.gate + 4 * (a.gate_width * t + a.gate_column), 4 * a.width * t
        gate_row(a.x + row, gate, a.width, a.out + row)


CPU = {
    "columns": Implementation(columns),
    "rope_rows": Implementation(rope_rows),
    "swap_halves": Implementation(swapped),
    "multiply": Implementation(multiply),
    "sigmoid": Implementation(sigmoids),
    "gate_rows": Implementation(gate_rows),
}
