"""A gated product of which most gates are zero, those below a cutoff that each row has for itself: the definition.

out[t, i] = gelu_tanh(max(x[t, i] - cutoff[t], 0)) * x[t, F + i],  cutoff = mean + deviations * standard deviation
"""

import numpy as np

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, maximum, sqrt
from lockstep.ops.elementwise.gates.gelu import gelu_tanh_gate
from lockstep.ops.math import ZERO, tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows


class SparseGate(Operands):
    """out = gelu_tanh(max(g - mean(g) - deviations * std(g), 0)) * second half of x, g its first half, row by row;
    x [rows, 2 width], out [rows, width]."""

    group = "elementwise"
    rules = ("width % 16 == 0",)
    out: Tensor = output("width")
    x: Tensor = rows("2 * width")
    width: int
    deviations: float

    def flops(self, context):
        return 20 * self.width


@definition
def sparse_gate(x_TW, deviations, out_TF):
    """Shapes: x [T, 2 F], out [T, F] float32; F a multiple of 16.

    Error: that of the cutoff, 4 ulp of |mean| + |deviations| * std, and of `gelu_tanh_gate`.
    Order: numbers, then squares of (g - mean) by FMA, are summed in 16 lanes as in `rms_norm`; mean = sum / F,
      std = sqrt(sum / F), cutoff = fma(std, deviations, mean); gelu_tanh_gate(max(g - cutoff, 0), up).
    Source: `Gemma3nTextMLP._gaussian_topk` in transformers.
    """
    F = out_TF.shape[1]
    lane = np.empty(16, np.float32)
    for t in range(x_TW.shape[0]):
        lane[:] = np.float32(0)
        for i in range(F):
            lane[i % 16] = lane[i % 16] + x_TW[t, i]
        mean = tree_sum(lane) / np.float32(F)
        lane[:] = np.float32(0)
        for i in range(F):
            away = x_TW[t, i] - mean
            lane[i % 16] = fma(away, away, lane[i % 16])
        cutoff = fma(sqrt(tree_sum(lane) / np.float32(F)), deviations, mean)
        for i in range(F):
            out_TF[t, i] = gelu_tanh_gate(maximum(x_TW[t, i] - cutoff, ZERO), x_TW[t, F + i])


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, T = SparseGate.read(op), num_rows(op, step)
        x_TW, out_TF = carray(float_array(a.x), (T, 2 * a.width)), carray(float_array(a.out), (T, a.width))
        sparse_gate(x_TW, a.deviations, out_TF)


REFERENCE = {"sparse_gate": Implementation(_run)}
