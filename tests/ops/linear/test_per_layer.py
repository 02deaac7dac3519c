"""Inputs that each layer has for itself: kernels equal the definitions, which are accurate."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.linear import per_layer, per_layer_cpu
from lockstep.ops.linear.per_layer import PerLayerGate, PerLayerInputs
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)
EPS = np.float32(1e-2)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def inputs(backend, x, embedded, weight, num_threads=1):
    sizes = dict(num_layers=x.shape[1] // len(weight), width=len(weight), eps=float(EPS))
    operands = dict(x=x, embedded=embedded, weight=weight, **sizes)
    return run_op(backend, PerLayerInputs, num_threads=num_threads, **operands)["out"]


def gate(backend, x, values, column, num_threads=1):
    sizes = dict(width=x.shape[1], values_width=values.shape[1], column=column)
    return run_op(backend, PerLayerGate, num_threads=num_threads, gate=x, values=values, **sizes)["out"]


@pytest.mark.parametrize("num_tokens, num_layers, width", [(1, 3, 16), (5, 2, 48), (17, 7, 256)])
def test_kernels_equal_definitions(num_tokens, num_layers, width):
    rows = normal(num_tokens, num_layers * width), normal(num_tokens, num_layers * width), normal(width)
    expected = inputs(per_layer.REFERENCE, *rows)
    same_bits(inputs(per_layer_cpu.CPU, *rows, num_threads=3), expected)
    same_bits(inputs(per_layer_cpu.PER_TOKEN, *rows, num_threads=2), expected)
    gated = normal(num_tokens, width), rows[0], (num_layers - 1) * width
    expected = gate(per_layer.REFERENCE, *gated)
    same_bits(gate(per_layer_cpu.CPU, *gated, num_threads=3), expected)
    same_bits(gate(per_layer_cpu.PER_TOKEN, *gated, num_threads=2), expected)


def test_definition_of_the_inputs_is_accurate_and_equals_interpreted():
    x, embedded, weight = normal(4, 96), normal(4, 96), normal(32)
    found = inputs(per_layer.REFERENCE, x, embedded, weight)
    runs = x.reshape(4, 3, 32).astype(np.float64)
    normed = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + EPS) * weight
    exact = normed + embedded.reshape(4, 3, 32)
    size = np.maximum(np.abs(normed), np.abs(embedded.reshape(4, 3, 32)))
    assert (np.abs(found.reshape(4, 3, 32) - exact) <= 4 * np.spacing(size.astype(np.float32))).all()
    out = np.empty((4, 3, 32), np.float32)
    interpreted(per_layer.per_layer_inputs)(x.reshape(out.shape), embedded.reshape(out.shape), weight, EPS, out)
    same_bits(found, out.reshape(4, 96))


def test_definition_of_the_gate_is_accurate_and_equals_interpreted():
    x, values = normal(4, 32), normal(4, 96)
    found, wide = gate(per_layer.REFERENCE, x, values, 32), x.astype(np.float64)
    exact = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) * values[:, 32:64]
    assert (np.abs(found - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32)) + 1e-7).all()
    out = np.empty((4, 32), np.float32)
    interpreted(per_layer.per_layer_gate)(x, values, 32, out)
    same_bits(found, out)


def test_columns_outside_are_refused():
    with pytest.raises(ValueError, match=r"PerLayerGate: expected column \+ width <= values_width"):
        gate(per_layer.REFERENCE, normal(1, 32), normal(1, 64), 48)
