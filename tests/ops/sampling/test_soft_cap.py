"""The soft cap of logits: kernels equal the definition, which is accurate and keeps broken rows broken."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.sampling import soft_cap, soft_cap_cpu
from lockstep.ops.sampling.soft_cap import SoftCap
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


def run(backend, logits, cap=30.0, num_threads=1):
    operands = dict(logits=logits, width=logits.shape[1], cap=cap)
    return run_op(backend, SoftCap, num_threads=num_threads, **operands)["out"]


def made(num_rows, width):
    """Logits of all sizes, among them small ones and such as the cap cuts off."""
    return (RNG.standard_normal((num_rows, width)) * 10.0 ** RNG.uniform(-6, 3, (num_rows, width))).astype(np.float32)


@pytest.mark.parametrize("num_rows, width", [(1, 16), (1, 4096), (3, 1040), (7, 2064)])
def test_kernels_equal_definition(num_rows, width):
    logits = made(num_rows, width)
    expected = run(soft_cap.REFERENCE, logits)
    same_bits(run(soft_cap_cpu.CPU, logits, num_threads=3), expected)
    same_bits(run(soft_cap_cpu.PER_TOKEN, logits, num_threads=2), expected)


@pytest.mark.parametrize("cap", [30.0, 7.3])
def test_definition_is_accurate_and_equals_interpreted(cap):
    logits = made(4, 8192)
    found, exact = run(soft_cap.REFERENCE, logits, cap), np.float32(cap) * np.tanh(logits / np.float64(np.float32(cap)))
    assert (np.abs(found - exact) <= 4 * np.spacing(np.abs(exact).astype(np.float32))).all()
    few, out = logits[:, :16].copy(), np.empty((4, 16), np.float32)
    interpreted(soft_cap.soft_cap)(few, np.float32(cap), out)
    same_bits(found[:, :16].copy(), out)


@pytest.mark.parametrize("backend", [soft_cap.REFERENCE, soft_cap_cpu.CPU])
def test_numbers_that_are_not_finite_stay_so_and_large_ones_are_the_cap(backend):
    logits = np.zeros((1, 16), np.float32)
    logits[0, :6] = np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-30
    out = run(backend, logits)[0]
    assert np.isnan(out[:3]).all() and out[3:6].tolist() == [30, -30, np.float32(1e-30)]


def test_a_cap_must_be_positive():
    with pytest.raises(ValueError, match="SoftCap: expected cap > 0"):
        run(soft_cap.REFERENCE, made(1, 16), 0.0)
