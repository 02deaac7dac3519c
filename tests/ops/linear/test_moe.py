"""Mixture of experts: routing, grouping and the weighted sum; kernels equal definitions."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.linear import moe, moe_cpu
from lockstep.ops.linear.moe import CombineExperts, GroupExperts, Route
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)


def logits_of(num_tokens, experts):
    """Logits with ties: every other row has only a few distinct values."""
    logits = (2 * RNG.standard_normal((num_tokens, experts))).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    return logits


def route(backend, logits, top_k, renormalise=True, num_threads=1, scale=None):
    """The outputs of a Route op. Rows of logits are padded to the width of a linear layer's output."""
    padded = np.pad(logits, ((0, 0), (0, -logits.shape[1] % 16)), constant_values=1e9)
    sizes = dict(num_experts=logits.shape[1], top_k=top_k, width=padded.shape[1])
    sizes |= dict(renormalise=renormalise, scale=scale)
    return run_op(backend, Route, num_threads=num_threads, logits=padded, **sizes)


def group(backend, ids, experts, num_threads=1):
    sizes = dict(num_experts=experts, top_k=ids.shape[1])
    return run_op(backend, GroupExperts, num_threads=num_threads, expert_ids=ids, **sizes)


def combine(backend, weights, y, num_threads=1, **shared):
    T, X, D = y.shape
    operands = dict(weights=weights, y=y.reshape(T, X * D), width=D, top_k=X, **shared)
    return run_op(backend, CombineExperts, num_threads=num_threads, **operands)["out"]


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("experts,top_k", [(1, 1), (2, 2), (8, 2), (15, 3), (60, 4), (128, 8), (16, 16)])
@pytest.mark.parametrize("renormalise", [False, True])
def test_route_kernel_equals_definition(num_tokens, experts, top_k, renormalise):
    logits = logits_of(num_tokens, experts)
    expected = route(moe.REFERENCE, logits, top_k, renormalise)
    fast = route(moe_cpu.CPU, logits, top_k, renormalise, num_threads=3)
    same_bits(fast["expert_ids"], expected["expert_ids"])
    same_bits(fast["weights"], expected["weights"])


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_factor_of_each_expert_multiplies_its_weights(renormalise):
    logits, scale = logits_of(7, 15), RNG.uniform(0.5, 2, 15).astype(np.float32)
    plain = route(moe.REFERENCE, logits, 3, renormalise)
    expected = plain["weights"] * scale[plain["expert_ids"]]
    for backend, num_threads in ((moe.REFERENCE, 1), (moe_cpu.CPU, 3)):
        found = route(backend, logits, 3, renormalise, num_threads, scale)
        same_bits(found["expert_ids"], plain["expert_ids"])
        same_bits(found["weights"], expected)


def test_route_is_accurate_and_ties_go_to_the_lowest_index():
    logits = logits_of(50, 64)
    out = route(moe.REFERENCE, logits, 6)
    same_bits(out["expert_ids"], np.argsort(-logits, axis=1, kind="stable")[:, :6].astype(np.int32))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    chosen = np.take_along_axis(p, out["expert_ids"].astype(int), 1)
    np.testing.assert_allclose(out["weights"], chosen / chosen.sum(1, keepdims=True), rtol=6e-7)
    np.testing.assert_allclose(route(moe.REFERENCE, logits, 6, False)["weights"], chosen, rtol=6e-7)


@pytest.mark.parametrize("num_tokens,experts,top_k", [(1, 1, 1), (1, 128, 8), (2, 3, 2), (17, 8, 2), (97, 60, 4)])
def test_group(num_tokens, experts, top_k):
    ids = route(moe_cpu.CPU, logits_of(num_tokens, experts), top_k)["expert_ids"]
    expected = group(moe.REFERENCE, ids, experts)
    for threads in (1, 3):
        fast = group(moe_cpu.CPU, ids, experts, threads)
        same_bits(fast["order"], expected["order"])
        same_bits(fast["expert_start"], expected["expert_start"])
    same_bits(expected["order"].ravel(), np.argsort(ids.ravel(), kind="stable").astype(np.int32))
    start = np.concatenate([[0], np.cumsum(np.bincount(ids.ravel(), minlength=experts))])
    same_bits(expected["expert_start"][0], start.astype(np.int32))


@pytest.mark.parametrize("num_tokens,top_k,width", [(1, 1, 16), (2, 8, 48), (7, 3, 1040)])
def test_combine(num_tokens, top_k, width):
    weights = RNG.random((num_tokens, top_k)).astype(np.float32)
    y = RNG.standard_normal((num_tokens, top_k, width)).astype(np.float32)
    expected = combine(moe.REFERENCE, weights, y)
    same_bits(combine(moe_cpu.CPU, weights, y, num_threads=3), expected)
    np.testing.assert_allclose(expected, np.einsum("tx,txd->td", weights.astype(np.float64), y), atol=2e-6)


@pytest.mark.parametrize("num_tokens,top_k,width", [(1, 1, 16), (2, 8, 48), (7, 3, 1040)])
def test_combine_with_a_shared_expert(num_tokens, top_k, width):
    weights = RNG.random((num_tokens, top_k)).astype(np.float32)
    y, shared = (RNG.standard_normal((num_tokens, *n, width)).astype(np.float32) for n in ((top_k,), ()))
    gates = np.full((num_tokens, 32), np.nan, np.float32)  # only one column is read
    gates[:, 17] = np.linspace(-200, 200, num_tokens) if num_tokens > 2 else RNG.standard_normal(num_tokens)
    operands = dict(shared_y=shared, gates=gates, gates_width=32, gate_column=17)
    expected = combine(moe.REFERENCE, weights, y, **operands)
    same_bits(combine(moe_cpu.CPU, weights, y, num_threads=3, **operands), expected)
    share = 1 / (1 + np.exp(-gates[:, 17:18].astype(np.float64)))
    exact = np.einsum("tx,txd->td", weights.astype(np.float64), y) + share * shared
    np.testing.assert_allclose(expected, exact, atol=3e-6)


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1, -(2**31)])
def test_an_id_that_is_no_experts_counts_as_the_last_ones(wrong):
    """Not as a place in memory that is nobody's."""
    ids = np.array([[0, 2], [1, 0], [2, 1]], np.int32)
    nearest, ids_of_none = ids.copy(), ids.copy()
    nearest[1, 0], ids_of_none[1, 0] = 2, wrong
    for backend, threads in ((moe.REFERENCE, 1), (moe_cpu.CPU, 1), (moe_cpu.CPU, 3)):
        expected, found = group(backend, nearest, 3, threads), group(backend, ids_of_none, 3, threads)
        same_bits(found["order"], expected["order"])
        same_bits(found["expert_start"], expected["expert_start"])


@pytest.mark.parametrize("left_out", [{"gates": None}, {"shared_y": None}, {"gate_column": 16}])
def test_a_shared_expert_has_a_gate(left_out):
    operands = dict(shared_y=np.ones((1, 16), np.float32), gates=np.ones((1, 16), np.float32), gates_width=16)
    with pytest.raises(ValueError, match="CombineExperts: expected a shared expert and its gate, or neither"):
        combine(moe.REFERENCE, np.ones((1, 1), np.float32), np.ones((1, 1, 16), np.float32), **operands | left_out)


def test_definitions_compiled_equal_interpreted():
    logits, ids, weights = logits_of(2, 20), np.empty((2, 3), np.int32), np.empty((2, 3), np.float32)
    interpreted(moe.route)(logits, np.empty(0, np.float32), 3, True, ids, weights)
    out = route(moe.REFERENCE, logits, 3)
    same_bits(out["expert_ids"], ids)
    same_bits(out["weights"], weights)
    order, start = np.empty_like(ids), np.empty((2, 21), np.int32)
    interpreted(moe.group_experts)(ids, order, start)
    same_bits(group(moe.REFERENCE, ids, 20)["order"], order)
    y, summed = RNG.standard_normal((2, 3, 16)).astype(np.float32), np.empty((2, 16), np.float32)
    interpreted(moe.combine_experts)(weights, y, summed)
    same_bits(combine(moe.REFERENCE, weights, y), summed)
    gates, shared = RNG.standard_normal((2, 16)).astype(np.float32), y[:, 0].copy()
    interpreted(moe.add_shared_expert)(shared, gates[:, 0], summed)
    same_bits(combine(moe.REFERENCE, weights, y, shared_y=shared, gates=gates, gates_width=16), summed)
