"""Records ragged.npz: the results of JAX's ref_ragged_paged_attention for tests/ops/attention/ragged_cases.py.

python -m tests.golden.record_ragged        (needs jax, on any machine; recorded with jax 0.10.2)
"""

import pathlib

import numpy as np
from jax import numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from tests.ops.attention.ragged_cases import RECORDED

PATH = pathlib.Path(__file__).with_name("ragged.npz")


def expected(batch):
    """The rows of all sequences, float32 [T, H, K]."""
    rows = ref_ragged_paged_attention(*map(jnp.asarray, batch.arguments()), **batch.options)
    return np.asarray(rows.astype(jnp.float32))


if __name__ == "__main__":
    results = {name: expected(batch) for name, batch in RECORDED.items()}
    halves = {
        name: (x.view(np.uint32) >> 16).astype(np.uint16) if RECORDED[name].dtype.itemsize == 2 else x
        for name, x in results.items()
    }
    np.savez_compressed(PATH, **halves)
