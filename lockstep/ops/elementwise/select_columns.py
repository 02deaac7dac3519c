"""The columns of a tensor in another order: the definition, which is the kernel, too. Bound by memory.

out[t, i] = x[t, order[i]]
"""

import numpy as np

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray
from lockstep.ops.share import contiguous
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows


class SelectColumns(Operands):
    """out = x with its columns in another order, row by row; x and out [rows, width]; order: an int32 tensor [1, width]
    that names each column once."""

    group = "elementwise"
    rules = ("width % 16 == 0",)
    out: Tensor = output("width")
    x: Tensor = rows("width")
    order: Weight = constant("1, width")
    width: int


@definition
def select_columns(x_TD, order_E, out_TE):
    """Copies the chosen columns.

    Shapes: x [T, D] float32; order [E] int32, each a column of x; out [T, E]. A thread has some of the columns.
    Error: none.
    Order: none.
    """
    for t in range(x_TD.shape[0]):
        for i in range(order_E.shape[0]):
            out_TE[t, i] = x_TD[t, order_E[i]]


def checked_order(weight: Weight) -> tuple[np.ndarray]:
    """The weight layout: int32 [width]. ValueError unless each column is named once: kernels read where it says."""
    [part] = weight.parts
    order = part.read().reshape(-1)
    if order.dtype != np.int32 or not (np.sort(order) == np.arange(weight.shape[-1])).all():
        raise ValueError(f"tensor {part.name!r}: expected an int32 order of {weight.shape[-1]} columns, each once")
    return (order,)


@kernel
def _run(op, step, thread, num_threads):
    """Columns are dealt to threads in whole cache lines, so that one row has work for all of them."""
    a, T = SelectColumns.read(op), num_rows(op, step)
    lines = contiguous(a.width // 16, thread, num_threads)
    first, end = 16 * lines.start, 16 * lines.stop
    x, out = carray(float_array(a.x), (T, a.width)), carray(float_array(a.out), (T, a.width))
    select_columns(x, carray(int_array(a.order), (a.width,))[first:end], out[:, first:end])


REFERENCE = {"select_columns": Implementation(_run, Layout("order of columns", checked_order))}
CPU = REFERENCE
