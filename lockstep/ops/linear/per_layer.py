"""Inputs of a token that each layer has for itself: the definitions.

values[t, l] = rms_norm(x[t, l]) + e[t, l]                    per layer l, from a projection and an embedding
out[t, i] = gelu_tanh(gate[t, i]) * values[t, column + i]     in a layer, whose values begin at `column`
"""

import numpy as np

from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, sqrt
from lockstep.ops.elementwise.gates.gelu import gelu_tanh_gate
from lockstep.ops.math import ONE, tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows


class PerLayerInputs(Operands):
    """out = x, each run of `width` columns divided by its root mean square and multiplied by the weight, + embedded.

    x, embedded and out [rows, num_layers * width]; all layers share the weight.
    """

    group = "elementwise"
    rules = ("width % 16 == 0", "eps >= 0")
    out: Tensor = output("num_layers * width")
    x: Tensor = rows("num_layers * width")
    embedded: Tensor = rows("num_layers * width")
    weight: Weight = constant("width")
    num_layers: int
    width: int
    eps: float

    def flops(self, context):
        return 6 * self.num_layers * self.width


class PerLayerGate(Operands):
    """out = gelu_tanh(gate) * values, the columns from `column` on; gate and out [rows, width]."""

    group = "elementwise"
    rules = ("width % 16 == 0", "column + width <= values_width")
    out: Tensor = output("width")
    gate: Tensor = rows("width")
    values: Tensor = rows("values_width")
    width: int
    values_width: int
    column: int

    def flops(self, context):
        return 14 * self.width


@definition
def per_layer_inputs(x_TLP, embedded_TLP, weight_P, eps, out_TLP):
    """Shapes: x, embedded, out [T, L, P] float32; weight [P]; P a multiple of 16.

    Error: below 4 ulp of the larger of both terms.
    Order: the scale of P values as in `rms_norm`; out = fma(x * scale, w, embedded).
    Source: Gemma 3n and Gemma 4, `project_per_layer_inputs` in transformers.
    """
    T, L, P = x_TLP.shape
    lane = np.empty(16, np.float32)
    for t in range(T):
        for layer in range(L):
            lane[:] = np.float32(0)
            for i in range(P):
                lane[i % 16] = fma(x_TLP[t, layer, i], x_TLP[t, layer, i], lane[i % 16])
            scale = ONE / sqrt(tree_sum(lane) / np.float32(P) + eps)
            for i in range(P):
                out_TLP[t, layer, i] = fma(x_TLP[t, layer, i] * scale, weight_P[i], embedded_TLP[t, layer, i])


@definition
def per_layer_gate(gate_TP, values_TW, column, out_TP):
    """Shapes: gate, out [T, P] float32; values [T, W] with column + P <= W. Error, Order: `gelu_tanh_gate`."""
    for t in range(gate_TP.shape[0]):
        for i in range(gate_TP.shape[1]):
            out_TP[t, i] = gelu_tanh_gate(gate_TP[t, i], values_TW[t, column + i])


@kernel
def _inputs(op, step, thread, num_threads):
    if thread == 0:
        a = PerLayerInputs.read(op)
        shape = num_rows(op, step), a.num_layers, a.width
        x_TLP, embedded_TLP = carray(float_array(a.x), shape), carray(float_array(a.embedded), shape)
        weight_P = carray(float_array(a.weight), (a.width,))
        per_layer_inputs(x_TLP, embedded_TLP, weight_P, a.eps, carray(float_array(a.out), shape))


@kernel
def _gate(op, step, thread, num_threads):
    if thread == 0:
        a, T = PerLayerGate.read(op), num_rows(op, step)
        values_TW = carray(float_array(a.values), (T, a.values_width))
        gate_TP, out_TP = carray(float_array(a.gate), (T, a.width)), carray(float_array(a.out), (T, a.width))
        per_layer_gate(gate_TP, values_TW, a.column, out_TP)


REFERENCE = {"per_layer_inputs": Implementation(_inputs), "per_layer_gate": Implementation(_gate)}
