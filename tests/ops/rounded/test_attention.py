"""Attention on grids: kernels equal the definition, each site is rounded, and without grids it is attention."""

import numpy as np
import pytest

from lockstep.ops.rounded import attention as rounded_attention
from lockstep.ops.rounded import attention_cpu as rounded_attention_cpu
from lockstep.ops.rounded.attention import SITES, RoundedAttention
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.pages import random_cache
from tests.ops.rounded.grid_cases import GRIDS, integer

REFERENCE, CPU = rounded_attention.REFERENCE, rounded_attention_cpu.CPU
NAMES = list(GRIDS)
OFF = np.stack([GRIDS["off"]] * 40)


def mixed_grids(num_heads, seed):
    """A different grid for every site and head."""
    chosen = np.random.default_rng(seed).choice(NAMES, len(SITES) * num_heads)
    made = np.stack([GRIDS[name] for name in chosen])
    made[3 * num_heads] = integer(1 / 255, 0, 0, 255)  # weights
    return made


class Batch:
    def __init__(self, lengths, contexts, H, G, K, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths, self.contexts, self.shape = lengths, contexts, (H, G, K)
        self.k_pages, self.v_pages, self.table, self.keys, self.values = random_cache(contexts, G, K, "f32", rng)
        self.q = rng.standard_normal((sum(lengths), H * K), np.float32)
        self.gate = rng.standard_normal((sum(lengths), 2 * H * K + 5), np.float32)

    def run(self, table, grids, num_threads=1, gated=False, **options):
        H, G, K = self.shape
        step, _held = ragged_step(self.lengths, self.contexts, self.table)
        gate = dict(gate=self.gate, gate_width=self.gate.shape[1], gate_offset=5 + K, gate_stride=2 * K)
        made = dict(num_heads=H, num_kv_heads=G, head_dim=K, max_keys=4096, scale=K**-0.5, additive=False, fill=-120.0)
        cached = dict(q=self.q, k_pages=self.k_pages, v_pages=self.v_pages, grids=grids, **(gate if gated else {}))
        return run_op(table, RoundedAttention, step=step, num_threads=num_threads, **cached, **made | options)["out"]


SHAPES = [(4, 2, 16), (6, 1, 48), (3, 3, 64), (8, 2, 32), (2, 1, 128)]
STEPS = [([1, 5, 1], [1, 70, 129]), ([33, 2], [33, 65]), ([1], [300])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths, contexts", STEPS)
@pytest.mark.parametrize("gated", [False, True])
def test_kernels_equal_definition(shape, lengths, contexts, gated):
    batch, grids = Batch(lengths, contexts, *shape), mixed_grids(shape[0], len(lengths))
    expected = batch.run(REFERENCE, grids, gated=gated)
    assert np.isfinite(expected).all()
    same_bits(batch.run(CPU, grids, 1, gated), expected)
    same_bits(batch.run(CPU, grids, 3, gated), expected)
    same_bits(batch.run(rounded_attention_cpu.PER_TOKEN, grids, 2, gated), expected)


@pytest.mark.parametrize("fill", [-120.0, -5.0])
def test_an_added_mask_counts_all_keys(fill):
    batch, grids = Batch([40, 3], [40, 3], 4, 2, 32), mixed_grids(4, 7)
    options = dict(additive=True, fill=fill)
    expected = batch.run(REFERENCE, grids, **options)
    same_bits(batch.run(CPU, grids, 3, **options), expected)
    assert (expected != batch.run(REFERENCE, grids)).any()


def test_without_grids_it_is_attention():
    batch = Batch([30], [90], 4, 2, 32)
    out = batch.run(CPU, OFF[: 5 * 4])
    q = batch.q.reshape(30, 4, 32).astype(np.float64)
    keys, values = (x[0].repeat(2, axis=1).astype(np.float64) for x in (batch.keys, batch.values))
    for t in range(30):
        seen = slice(0, 61 + t)
        scores = np.einsum("hd,chd->hc", q[t], keys[seen]) * 32**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("hc,chd->hd", weights / weights.sum(-1, keepdims=True), values[seen])
        np.testing.assert_allclose(out[t].reshape(4, 32), expected, atol=3e-6)


@pytest.mark.parametrize("site", range(len(SITES)))
def test_one_wrong_head_shows(site):
    batch, grids = Batch([9], [70], 4, 2, 32), np.stack([GRIDS["mxint8"]] * 20)
    options = dict(additive=True, fill=-9.0)
    right = batch.run(CPU, grids, **options)
    wrong = grids.copy()
    wrong[4 * site + 2] = GRIDS["mxfp4"]
    found = batch.run(CPU, wrong, **options).reshape(9, 4, 32)
    assert [(found[:, h] != right.reshape(9, 4, 32)[:, h]).any() for h in range(4)] == [False, False, True, False]


def test_a_row_of_scores_has_a_limit():
    with pytest.raises(ValueError, match="expected max_keys <= 32768, got max_keys 40000"):
        Batch([1], [1], 4, 2, 16).run(CPU, OFF[:20], max_keys=40000)
