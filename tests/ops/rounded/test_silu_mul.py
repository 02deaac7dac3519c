"""SwiGLU on grids: kernels equal the definition, and each site is rounded."""

import numpy as np
import pytest

from lockstep.ops.rounded import silu_mul as rounded_silu_mul
from lockstep.ops.rounded import silu_mul_cpu as rounded_silu_mul_cpu
from lockstep.ops.rounded.silu_mul import RoundedSiluMul
from tests.ops.harness import run_op, same_bits
from tests.ops.rounded.grid_cases import GRIDS

RNG = np.random.default_rng(5)
X = (3 * RNG.standard_normal((5, 2 * 208))).astype(np.float32)


def run(table, names, num_threads=1, x=X):
    width = x.shape[1] // 2
    grids = np.stack([GRIDS[name] for name in names])
    return run_op(table, RoundedSiluMul, num_threads=num_threads, x=x, grids=grids, width=width)["out"]


@pytest.mark.parametrize("width", [16, 33, 208])
def test_kernels_equal_definition(width):
    x = np.ascontiguousarray(X[:, : 2 * width])
    for _ in range(8):
        names = RNG.choice(list(GRIDS), 3)
        expected = run(rounded_silu_mul.REFERENCE, names, x=x)
        same_bits(run(rounded_silu_mul_cpu.CPU, names, 3, x), expected)
        same_bits(run(rounded_silu_mul_cpu.PER_TOKEN, names, 2, x), expected)


def test_without_grids_it_is_accurate():
    gate, up = X[:, :208].astype(np.float64), X[:, 208:]
    exact = gate / (1 + np.exp(-gate)) * up
    out = run(rounded_silu_mul_cpu.CPU, ["off"] * 3)
    assert (np.abs(out - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() < 4


def test_every_site_is_rounded():
    outs = [run(rounded_silu_mul_cpu.CPU, ["off"] * 3)]
    for site in range(3):
        names = ["off"] * 3
        names[site] = "mxfp4"
        outs.append(run(rounded_silu_mul_cpu.CPU, names))
    assert len({out.tobytes() for out in outs}) == 4
