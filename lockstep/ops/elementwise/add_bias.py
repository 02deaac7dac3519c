"""Adds one row of biases to every row: the definition, whose plain loop vectorises, so that it is the kernel, too.

out[t, i] = x[t, i] + bias[i]
"""

import numpy as np

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows


class AddBias(Operands):
    """out = x + bias, row by row; x and out [rows, width]."""

    group = "elementwise"
    in_place = True
    out: Tensor = output("width")
    x: Tensor = rows("width")
    bias: Weight = constant("1, width")
    width: int

    def flops(self, context):
        return self.width


@definition
def add_bias(x_TD, bias_D, out_TD):
    """Shapes: x, out [T, D], bias [D], float32. Error: half an ulp. Order: one addition per element."""
    for t in range(x_TD.shape[0]):
        for i in range(x_TD.shape[1]):
            out_TD[t, i] = x_TD[t, i] + bias_D[i]


def padded_bias(weight):
    """The weight layout: biases of all parts end to end, then zeros up to the row's width."""
    joined = np.concatenate([part.finite_f32().reshape(-1) for part in weight.parts])
    return (np.pad(joined, (0, weight.shape[-1] - len(joined))),)


@kernel
def _run(op, step, thread, num_threads):
    a, T = AddBias.read(op), num_rows(op, step)
    first, end = T * thread // num_threads, T * (thread + 1) // num_threads
    x = carray(float_array(a.x + 4 * a.width * first), (end - first, a.width))
    out = carray(float_array(a.out + 4 * a.width * first), (end - first, a.width))
    add_bias(x, carray(float_array(a.bias), (a.width,)), out)


REFERENCE = {"add_bias": Implementation(_run, Layout("padded bias", padded_bias))}
CPU = REFERENCE
