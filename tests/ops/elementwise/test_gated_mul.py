"""Gated products: kernels equal the definition, which is accurate."""

import re

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import gated_mul, gated_mul_cpu
from lockstep.ops.elementwise.gated_mul import GatedMul
from lockstep.ops.elementwise.gates import GATES
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)
EXACT = {  # (activation of the gate, what it is multiplied with), in float64
    "silu": lambda g, up: (g / (1 + np.exp(-g)), up),
    "gelu_tanh": lambda g, up: (0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))), up),
    "clamped_swiglu": lambda g, up: (
        np.minimum(g, 7) / (1 + np.exp(-1.702 * np.minimum(g, 7))),
        np.clip(up, -7, 7) + 1,
    ),
}
ABSOLUTE = {"silu": 0.0, "gelu_tanh": 5e-8, "clamped_swiglu": 5e-8}  # error of a gate below -1
LARGEST = {"clamped_swiglu": 2 * 7}  # what a large gate beside 1 becomes, where it does not stay as it is


def inputs(num_tokens, width):
    return (3 * RNG.standard_normal((num_tokens, 2 * width))).astype(np.float32)


def run(backend, x, activation, num_threads=1):
    width = x.shape[1] // 2
    return run_op(
        backend, GatedMul, num_threads=num_threads, out=(width, "f32"), x=x, width=width, activation=activation
    )["out"]


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 17])
@pytest.mark.parametrize("width", [16, 48, 512, 1040])
def test_kernels_equal_definition(num_tokens, width, activation):
    x = inputs(num_tokens, width)
    expected = run(gated_mul.REFERENCE, x, activation)
    same_bits(run(gated_mul_cpu.CPU, x, activation, num_threads=3), expected)
    same_bits(run(gated_mul_cpu.PER_TOKEN, x, activation, num_threads=2), expected)


@pytest.mark.parametrize("activation", GATES)
def test_definition_compiled_equals_interpreted(activation):
    x, gate = inputs(2, 16), interpreted(GATES[activation])
    same_bits(run(gated_mul.REFERENCE, x, activation), np.float32([[gate(*p) for p in r.reshape(2, 16).T] for r in x]))


@pytest.mark.parametrize("activation", GATES)
def test_definition_is_accurate(activation):
    x = inputs(8, 1024)
    gate = x[:, :1024].astype(np.float64)
    activated, up = EXACT[activation](gate, x[:, 1024:].astype(np.float64))
    exact = activated * up
    allowed = 4 * np.spacing(np.abs(exact).astype(np.float32)) + (gate < -1) * ABSOLUTE[activation] * np.abs(up)
    assert (np.abs(run(gated_mul.REFERENCE, x, activation) - exact) < allowed).all()


@pytest.mark.parametrize("activation", GATES)
def test_large_gates_are_finite(activation):
    x = np.repeat(np.float32([-1e30, -1e4, -88, 0, 88, 1e4, 1e30]), 16).reshape(-1, 1, 16)
    x = np.concatenate([x, np.ones_like(x)], axis=1).reshape(-1, 32)
    found, gate = run(gated_mul.REFERENCE, x, activation), x[:, :16]
    large = LARGEST.get(activation, gate[gate > 80])
    assert np.isfinite(found).all() and np.allclose(found[gate > 80], large, rtol=1e-4 if activation in LARGEST else 0)
    assert (np.abs(found[gate <= 0]) < 2e-8).all()


@pytest.mark.parametrize("activation", GATES)
def test_nan_is_not_limited_to_a_number(activation):
    x = np.ones((2, 32), np.float32)
    x[0, 3] = x[1, 19] = np.nan
    for table in (gated_mul.REFERENCE, gated_mul_cpu.CPU):
        assert np.isnan(run(table, x, activation)).tolist() == [[i == 3 for i in range(16)]] * 2


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=re.escape("GatedMul: activation is 'relu', expected one of 'silu'")):
        run(gated_mul.REFERENCE, inputs(1, 16), "relu")
