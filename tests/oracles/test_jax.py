"""Live comparison of ragged paged attention with JAX's reference: the batches of JAX's tests, and random batches."""

import os
import secrets

import numpy as np
import pytest

from lockstep.ops import ragged_paged_attention
from tests.ops.attention.ragged_cases import BF16, E4M3, E5M2, F32, I8, Batch

jax = pytest.importorskip("jax", reason="jax is needed")
kernels = pytest.importorskip("jax.experimental.pallas.ops.tpu.ragged_paged_attention")

SEED = int(os.environ.get("LOCKSTEP_SEED") or secrets.randbelow(1 << 30))
CONTEXTS = [18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328]
MIXES = {
    "basic": ([192, 128, 64], [328, 180, 255]),  # few lengths: JAX compiles its reference again for each
    "mixed": ([5, 1, 120, 1, 1, 32, 251, 1, 1, 99, 1, 5, 3, 117, 1, 1], CONTEXTS),
}


def check(batch):
    """Checks every row within JAX's own tolerance; far below it, unless the reference rounds weights to float8."""
    arguments = batch.arguments()
    expected = kernels.ref_ragged_paged_attention(*map(jax.numpy.asarray, arguments), **batch.options)
    made = ragged_paged_attention(*arguments, **batch.options)
    expected = np.asarray(expected.astype(jax.numpy.float32))
    difference = np.abs(made[: len(expected)].astype(np.float32) - expected)
    if batch.pages_dtype is not None and "k_scale" not in batch.options:
        assert (difference < 0.2 + 0.2 * np.abs(expected)).all(), (batch, SEED)
    else:
        assert difference.max() < (0.05 if batch.dtype == BF16 else 2e-5), (batch, SEED)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_published_mixes(mix, dtype):
    check(Batch(*MIXES[mix], (32, 8, 128), 16, dtype, SEED, options=dict(sm_scale=128**-0.5)))


@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.5, "v_scale": 0.5}], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_published_quantized_cache(dtype, scales):
    check(Batch(*MIXES["basic"], (32, 8, 128), 16, BF16, SEED, options=scales, pages_dtype=dtype))


@pytest.mark.parametrize("case", range(6))
def test_random_batches(case):
    rng = np.random.default_rng([SEED, case])
    lengths = rng.integers(1, 100, rng.integers(1, 5))
    G, K = int(rng.choice([1, 2, 4])), int(rng.choice([64, 80, 96, 128, 256, 512]))
    pages_dtype = rng.choice([None, E4M3, E5M2, I8])
    options = dict(sm_scale=K**-0.5, sliding_window=rng.choice([None, 5, 128]), soft_cap=rng.choice([None, 50.0]))
    scales = {"k_scale": 1 / 32, "v_scale": 1 / 32} if pages_dtype == I8 else {"k_scale": 0.5, "v_scale": 0.5}
    options |= scales if pages_dtype is not None else rng.choice([{}, scales])
    check(
        Batch(
            list(lengths),
            list(lengths + rng.integers(0, 50, len(lengths))),
            (G * int(rng.integers(1, 17)), G, K),
            int(rng.integers(1, 257)),
            [F32, BF16][case % 2],
            case,
            options=options,
            pages_dtype=pages_dtype,
        )
    )
