import numpy as np
import pytest

from lockstep.ops import silu_mul, silu_mul_cpu
from lockstep.ops.silu_mul import SiluMul
from lockstep.runtime.kernel import interpreted
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


def inputs(num_tokens, width):
    return (3 * RNG.standard_normal((num_tokens, 2 * width))).astype(np.float32)


def run(backend, x, num_threads=1):
    width = x.shape[1] // 2
    return run_op(backend, SiluMul, num_threads=num_threads, out=(width, "f32"), x=x, width=width)["out"]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 17])
@pytest.mark.parametrize("width", [16, 48, 512, 1040])
def test_kernels_equal_definition(num_tokens, width):
    x = inputs(num_tokens, width)
    expected = run(silu_mul.REFERENCE, x)
    same_bits(run(silu_mul_cpu.CPU, x, num_threads=3), expected)
    same_bits(run(silu_mul_cpu.PER_TOKEN, x, num_threads=2), expected)


def test_definition_compiled_equals_interpreted():
    x, out = inputs(2, 16), np.empty((2, 16), np.float32)
    interpreted(silu_mul.silu_mul)(x, out)
    same_bits(run(silu_mul.REFERENCE, x), out)


def test_definition_is_accurate():
    x = inputs(8, 1024)
    gate, up = x[:, :1024].astype(np.float64), x[:, 1024:]
    exact = gate / (1 + np.exp(-gate)) * up
    error = np.abs(run(silu_mul.REFERENCE, x) - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert error.max() < 4
