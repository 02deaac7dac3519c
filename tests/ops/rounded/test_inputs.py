"""Inputs of attention on grids: kernels equal the definition, and each site is rounded."""

import numpy as np
import pytest

from lockstep.ops.attention import kv_cache
from lockstep.ops.attention.kv_cache import AttentionInputs
from lockstep.ops.rounded import inputs as rounded_inputs
from lockstep.ops.rounded import inputs_cpu as rounded_inputs_cpu
from lockstep.ops.rounded.inputs import K_SITES, Q_SITES, SITES, RoundedInputs
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.rounded.grid_cases import GRIDS

REFERENCE, CPU, PER_TOKEN = rounded_inputs.REFERENCE, rounded_inputs_cpu.CPU, rounded_inputs_cpu.PER_TOKEN


class Batch:
    """A projection of some tokens, and where its keys and values go."""

    def __init__(self, H, G, K, rope_dim, normed, q_gap=0, seed=0):
        rng = np.random.default_rng(seed)
        self.step, self._held = ragged_step([3, 70, 1], [5, 70, 130], np.arange(9, dtype=np.int32).reshape(3, 3))
        stride = K + q_gap
        self.sizes = dict(num_heads=H, num_kv_heads=G, head_dim=K, rope_dim=rope_dim, row_width=H * stride + 2 * G * K)
        where = dict(q_offset=0, q_stride=stride, k_offset=H * stride, v_offset=H * stride + G * K)
        self.sizes |= where | dict(eps=1e-6, norm_offset=0.0)
        self.x = rng.standard_normal((74, self.sizes["row_width"]), np.float32)
        angle = rng.uniform(0, 6.2, (131, max(1, rope_dim // 2)))
        self.tables = dict(cos=np.cos(angle).astype(np.float32), sin=np.sin(angle).astype(np.float32))
        norms = (rng.uniform(0.5, 1.5, K).astype(np.float32) for _ in "qk")
        self.norms = dict(zip(("q_norm", "k_norm"), norms, strict=True)) if normed else {}

    def run(self, table, grids, num_threads=1, pre_negated=False):
        """(q, k pages, v pages)."""
        G, K = self.sizes["num_kv_heads"], self.sizes["head_dim"]
        pages = dict(k_pages=np.zeros((9, G, K, 64), np.float32), v_pages=np.zeros((9, G, 64, K), np.float32))
        made = dict(x=self.x, **self.tables, **pages, **self.norms, **grids, **self.sizes)
        q = run_op(table, RoundedInputs, self.step, num_threads, pre_negated=pre_negated, **made)["q"]
        return q, pages["k_pages"], pages["v_pages"]

    def grids(self, choose):
        """Grids of all operands. choose: a function from a number of rows to names in GRIDS."""
        H, G = self.sizes["num_heads"], self.sizes["num_kv_heads"]
        counts = dict(q_grids=Q_SITES * H, k_grids=K_SITES * G, v_grids=G, rope_grids=2)
        return {name: np.stack([GRIDS[word] for word in choose(count)]) for name, count in counts.items()}


def mixed(seed):
    rng = np.random.default_rng(seed)
    return lambda count: rng.choice(list(GRIDS), count)


SHAPES = [
    (4, 2, 16, 16, False),
    (2, 1, 32, 32, True),
    (3, 3, 48, 16, True),
    (4, 2, 64, 0, False),
    (2, 2, 128, 128, True),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pre_negated", [False, True])
def test_kernels_equal_definition(shape, pre_negated):
    batch = Batch(*shape, q_gap=shape[2] if shape[0] == 4 else 0)
    for seed in range(2):
        grids = batch.grids(mixed(seed))
        expected = batch.run(REFERENCE, grids, 1, pre_negated)
        for table, threads in ((CPU, 1), (CPU, 3), (PER_TOKEN, 2)):
            for made, right in zip(batch.run(table, grids, threads, pre_negated), expected, strict=True):
                same_bits(made, right)


@pytest.mark.parametrize("pre_negated", [False, True])
def test_without_grids_it_is_what_enters_attention(pre_negated):
    batch = Batch(4, 2, 32, 16, True)
    made = batch.run(CPU, batch.grids(lambda count: ["off"] * count), 1, pre_negated)
    pages = dict(k_pages=np.zeros((9, 2, 32, 64), np.float32), v_pages=np.zeros((9, 2, 64, 32), np.float32))
    given = dict(x=batch.x, **batch.tables, **pages, **batch.norms, **batch.sizes)
    q = run_op(kv_cache.REFERENCE, AttentionInputs, batch.step, bf16=False, **given)["q"]
    np.testing.assert_allclose(made[0], q, atol=1e-6)
    np.testing.assert_allclose(made[1], pages["k_pages"], atol=1e-6)
    same_bits(made[2], pages["v_pages"])


@pytest.mark.parametrize("site", range(len(SITES)))
def test_one_wrong_head_shows(site):
    batch = Batch(4, 2, 32, 32, True)
    grids = batch.grids(lambda count: ["mxint8"] * count)
    right = batch.run(CPU, grids)
    wrong = {name: rows.copy() for name, rows in grids.items()}
    wrong["k_grids"][2 * site + 1] = GRIDS["mxfp4"]
    if site < Q_SITES:
        wrong["q_grids"][4 * site + 2] = GRIDS["mxfp4"]
    q, k, v = batch.run(CPU, wrong)
    heads = (q != right[0]).reshape(-1, 4, 32).any((0, 2)).tolist()
    assert heads == [False, False, site < Q_SITES, False]
    assert (k != right[1]).any((0, 2, 3)).tolist() == [False, True]
    same_bits(v, right[2])


def test_the_sign_of_the_table_shows_only_on_grids_without_symmetry():
    batch = Batch(2, 1, 32, 32, False)
    for name, same in (("i8", True), ("u3", False)):
        grids = batch.grids(lambda count, name=name: [name] * count)
        one, two = (batch.run(CPU, grids, 1, sign)[0] for sign in (False, True))
        assert (one == two).all() == same
