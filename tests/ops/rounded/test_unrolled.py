"""The small steps of attention and of its inputs: kernels equal definitions."""

import numpy as np
import pytest

from lockstep.ops.rounded import unrolled_heads, unrolled_heads_cpu, unrolled_rows, unrolled_rows_cpu
from lockstep.ops.rounded.unrolled_heads import HeadScores, HeadValues, KeepHead, MaskRows, ScaleRows, SoftmaxRows
from lockstep.ops.rounded.unrolled_rows import Columns, GateRows, Multiply, RopeRows, Sigmoid, SwapHalves
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.pages import random_cache

REFERENCE = unrolled_rows.REFERENCE | unrolled_heads.REFERENCE
CPU = unrolled_rows_cpu.CPU | unrolled_heads_cpu.CPU
RNG = np.random.default_rng(4)


def numbers(*shape):
    return RNG.standard_normal(shape, np.float32)


def by_all(declaration, step=None, **operands):
    """The output of the definition, to which 1 to 3 threads of the kernel must be equal."""
    expected = run_op(REFERENCE, declaration, step, **operands)["out"]
    for num_threads in (1, 2, 3):
        same_bits(run_op(CPU, declaration, step, num_threads, **operands)["out"], expected)
    return expected


# ------------------------------------------------------------ rows


@pytest.mark.parametrize("width", [1, 15, 16, 33])
def test_columns(width):
    x = numbers(7, 50)
    out = by_all(Columns, x=x, width=width, x_width=50, x_column=11, out_width=40, out_column=3)
    same_bits(out[:, 3 : 3 + width], x[:, 11 : 11 + width])
    assert np.isnan(out[:, :3]).all() and np.isnan(out[:, 3 + width :]).all()
    with pytest.raises(ValueError, match=r"Columns: expected x_column \+ width <= x_width, got width"):
        by_all(Columns, x=x, width=width, x_width=50, x_column=51 - width, out_width=40, out_column=0)


@pytest.mark.parametrize("half", [1, 8, 16, 23])
@pytest.mark.parametrize("sign", [False, True])
def test_rope_rows_and_swapped_halves(half, sign):
    values, step = numbers(80, half), ragged_step([2, 3], [2, 80])
    out = by_all(RopeRows, step[0], values=values, half=half, negated=sign)
    there = values[[0, 1, 77, 78, 79]]
    same_bits(out, np.hstack([-there if sign else there, there]))
    x1, x2 = numbers(5, half), numbers(5, half)
    out = by_all(SwapHalves, x1=x1, x2=x2, half=half, pre_negated=sign)
    same_bits(out, np.hstack([x2 if sign else -x2, x1]))


@pytest.mark.parametrize("width", [1, 15, 16, 33])
def test_products_and_sigmoids(width):
    x, y = numbers(5, 50), numbers(5, 40)
    out = by_all(Multiply, x=x, y=y, width=width, x_width=50, x_column=17, y_width=40, y_column=2)
    same_bits(out, x[:, 17 : 17 + width] * y[:, 2 : 2 + width])
    out = by_all(Sigmoid, x=x, width=width, x_width=50, x_column=5)
    np.testing.assert_allclose(out, 1 / (1 + np.exp(-x[:, 5 : 5 + width].astype(np.float64))), rtol=1e-6)


def test_gates():
    x, gate = numbers(5, 48), numbers(5, 100)
    x[0, :4] = (1e-38, -1e-38, 0, -0.0)
    out = by_all(GateRows, x=x, gate=gate, width=48, gate_width=100, gate_column=7)
    np.testing.assert_allclose(out[1:], x[1:] / (1 + np.exp(-gate[1:, 7:55])), rtol=1e-5)
    assert out[0, :4].tobytes() == np.array([0, 0, 0, 0], np.float32).tobytes()


# ------------------------------------------------------------ one head

LENGTHS, CONTEXTS, WIDTH = [1, 20, 3, 1], [70, 20, 131, 1], 144
THERE = np.concatenate([np.arange(c - n, c) for n, c in zip(LENGTHS, CONTEXTS, strict=True)])


class Head:
    """Kv head 1 of 3, and the number of keys of each row."""

    def __init__(self, K, additive):
        self.K, self.additive = K, additive
        self.k_pages, self.v_pages, table, keys, values = random_cache(CONTEXTS, 3, K, "f32", RNG)
        self.keys, self.values = ([x[:, 1] for x in each] for each in (keys, values))
        self.step, self._held = ragged_step(LENGTHS, CONTEXTS, table)
        self.request = np.repeat(range(4), LENGTHS)
        self.count = np.array(CONTEXTS)[self.request] if additive else THERE + 1
        self.sizes = dict(num_kv_heads=3, head_dim=K, kv_head=1, width=WIDTH, additive=additive)

    def run(self, declaration, width=WIDTH, **operands):
        """The output, equal by definition and kernels, with 0 in columns past a row's keys."""
        names = [name for name in self.sizes if name in declaration.parameters()]
        operands |= {name: self.sizes[name] for name in names} | dict(width=width)
        made = [run_op(REFERENCE, declaration, self.step, **operands)["out"]]
        made += [run_op(CPU, declaration, self.step, n, **operands)["out"] for n in (1, 2, 3)]
        if made[0].shape[1] == width:
            for out in made:
                out[np.arange(width) >= self.count[:, None]] = 0
        for out in made[1:]:
            same_bits(out, made[0])
        return made[0]


@pytest.mark.parametrize("K", [16, 48, 128])
@pytest.mark.parametrize("additive", [False, True])
def test_scores_and_values(K, additive):
    head = Head(K, additive)
    q, p = numbers(25, K), numbers(25, WIDTH)
    p[np.arange(WIDTH) >= head.count[:, None]] = np.nan
    scores, values = head.run(HeadScores, q=q, k_pages=head.k_pages), head.run(HeadValues, p=p, v_pages=head.v_pages)
    for t, count in enumerate(head.count):
        k, v = (each[head.request[t]][:count].astype(np.float64) for each in (head.keys, head.values))
        np.testing.assert_allclose(scores[t, :count], k @ q[t], atol=1e-4)
        np.testing.assert_allclose(values[t], p[t, :count] @ v, atol=1e-4)


@pytest.mark.parametrize("additive", [False, True])
def test_scale_mask_and_softmax(additive):
    head, x = Head(16, additive), numbers(25, WIDTH)
    seen = np.arange(WIDTH) < head.count[:, None]
    x[~seen] = np.nan
    same_bits(head.run(ScaleRows, x=x, factor=0.3), np.where(seen, x * np.float32(0.3), np.float32(0)))
    p = head.run(SoftmaxRows, x=x)
    e = np.where(seen, np.exp(np.where(seen, x, 0).astype(np.float64)), 0)
    np.testing.assert_allclose(p, e / e.sum(1, keepdims=True), rtol=1e-5)
    if additive:
        after = np.arange(WIDTH) > THERE[:, None]
        masked = head.run(MaskRows, x=x, fill=-9.0)
        same_bits(masked, np.where(seen, x + np.where(after, np.float32(-9), np.float32(0)), np.float32(0)))


def test_a_mask_that_is_not_added_is_refused():
    with pytest.raises(ValueError, match="MaskRows: expected additive, got additive False"):
        run_op(CPU, MaskRows, x=numbers(2, 16), width=16, fill=-1.0, additive=False)


@pytest.mark.parametrize("table", [REFERENCE, CPU], ids=["reference", "cpu"])
def test_a_row_with_more_keys_than_columns_is_unknown(table):
    head = Head(16, False)
    made = dict(num_kv_heads=3, head_dim=16, kv_head=1, width=64, additive=False)
    scores = run_op(table, HeadScores, head.step, 2, q=numbers(25, 16), k_pages=head.k_pages, **made)["out"]
    p = run_op(table, SoftmaxRows, head.step, 2, x=scores, width=64, additive=False)["out"]
    values = run_op(table, HeadValues, head.step, 2, p=p, v_pages=head.v_pages, **made)["out"]
    assert (np.isnan(values).any(1) == (head.count > 64)).all() and (head.count > 64).any()


@pytest.mark.parametrize("K", [16, 48])
def test_keys_and_values_are_kept(K):
    k, v, step = numbers(25, K), numbers(25, K), ragged_step(LENGTHS, CONTEXTS, np.arange(12).reshape(4, 3))
    for table, num_threads in ((REFERENCE, 1), (CPU, 1), (CPU, 2), (CPU, 3)):
        pages = dict(k_pages=np.zeros((12, 3, K, 64), np.float32), v_pages=np.zeros((12, 3, 64, K), np.float32))
        run_op(table, KeepHead, step[0], num_threads, k=k, v=v, **pages, num_kv_heads=3, head_dim=K, kv_head=2)
        page, slot = 3 * np.repeat(range(4), LENGTHS) + THERE // 64, THERE % 64
        same_bits(pages["k_pages"][page, 2, :, slot], k)
        same_bits(pages["v_pages"][page, 2, slot], v)
        assert np.count_nonzero(pages["k_pages"]) == np.count_nonzero(pages["v_pages"]) == k.size


def test_pages_of_other_heads_are_refused():
    head = Head(16, False)
    with pytest.raises(ValueError, match=r"HeadValues: a page of v_pages is \(3, 64, 16\), expected \(2, 64, 16\)"):
        head.sizes["num_kv_heads"] = 2
        head.run(HeadValues, p=numbers(25, WIDTH), v_pages=head.v_pages)
