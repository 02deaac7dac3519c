"""The residual addition: kernels equal the definition."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise import add, add_cpu
from lockstep.ops.elementwise.add import Add, AddScaled
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


def run(backend, x, y, num_threads=1, factor=1.0):
    return run_op(backend, Add, num_threads=num_threads, x=x, y=y, width=x.shape[1], factor=factor)["out"]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 97])
@pytest.mark.parametrize("width, factor", [(15, 1.0), (16, 0.22), (33, 1.0), (1040, 0.22)])
def test_kernels_equal_definition(num_tokens, width, factor):
    x, y = RNG.standard_normal((2, num_tokens, width)).astype(np.float32)
    expected = run(add.REFERENCE, x, y, factor=factor)
    same_bits(run(add_cpu.CPU, x, y, 3, factor), expected)
    same_bits(run(add_cpu.PER_TOKEN, x, y, 2, factor), expected)


def test_definition_is_the_sum_and_equals_interpreted():
    x, y = RNG.standard_normal((2, 3, 17)).astype(np.float32)
    out = np.empty_like(x)
    interpreted(add.add)(x, y, np.float32(1), out)
    same_bits(out, x + y)
    same_bits(run(add.REFERENCE, x, y), out)
    interpreted(add.add)(x, y, np.float32(0.22), out)
    same_bits(out, (x + np.float64(np.float32(0.22)) * y).astype(np.float32))
    same_bits(run(add.REFERENCE, x, y, factor=0.22), out)


@pytest.mark.parametrize("num_tokens, width", [(1, 15), (3, 33), (7, 1040)])
def test_a_sum_times_a_number(num_tokens, width):
    x, y = RNG.standard_normal((2, num_tokens, width)).astype(np.float32)
    factor, out = np.float32([0.37]), np.empty_like(x)
    operands = dict(x=x, y=y, factor=factor, width=width)
    run = lambda table, num_threads: run_op(table, AddScaled, num_threads=num_threads, **operands)["out"]
    same_bits(run(add.REFERENCE, 1), (x + y) * factor)
    same_bits(run(add_cpu.CPU, 3), (x + y) * factor)
    same_bits(run(add_cpu.PER_TOKEN, 2), (x + y) * factor)
    interpreted(add.add_scaled)(x, y, factor, out)
    same_bits(out, (x + y) * factor)
