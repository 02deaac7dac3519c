"""The experts' linear layers: fast kernels equal definitions, and each row is that of an ordinary linear layer."""

import numpy as np
import pytest

from lockstep.engine.selfcheck.weights import stored
from lockstep.formats import FORMATS
from lockstep.formats.parts import products
from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.native.kernel import interpreted
from lockstep.ops.elementwise.gates import GATES
from lockstep.ops.linear import experts, experts_cpu
from lockstep.ops.linear.experts import ExpertBias, ExpertGated, ExpertLinear, ExpertRows, ExpertScatter
from lockstep.ops.linear.linear import PREPARATION
from lockstep.runtime.program import Tensor, Weight
from lockstep.weights.tensor import StoredTensor
from tests.ops.harness import ragged_step, run_op, same_bits

E, X, D, N = 4, 2, 64, 96
STORED = [name for name, format in FORMATS.items() if format.stored.encode is None]  # nothing is quantized to them
TOLERANCE = {"f32": 1e-4, "f16": 1e-4, "bf16": 0.4, "q8_0": 0.5, "q4_0": 5}  # of STORED 0.05: their weights are exact


def routed(T, seed):
    """(order, expert_start) of T tokens that never choose expert 1."""
    ids = np.array([np.random.RandomState(seed + t).permutation([0, 2, 3])[:X] for t in range(T)]).reshape(-1)
    order = np.argsort(ids, kind="stable").astype(np.int32).reshape(T, X)
    start = np.zeros((T, E + 1), np.int32)
    start[0] = np.searchsorted(np.sort(ids), np.arange(E + 1))
    return order, start


def ids_of(order, start):
    """The experts of each token, [T, X]."""
    ids = np.empty(order.size, np.int32)
    for e in range(E):
        ids[order.reshape(-1)[start[0, e] : start[0, e + 1]]] = e
    return ids.reshape(order.shape)


def both(declaration, T, **operands):
    """The output of the definition; the kernel must give the same bits with every number of threads."""
    step, _held = ragged_step([T])
    expected = run_op(experts.REFERENCE, declaration, step, **operands)["out"]
    for threads in (1, 3):
        same_bits(run_op(experts_cpu.CPU, declaration, step, threads, **operands)["out"], expected)
    return expected


def prepared(format, width):
    """The operands of an op that prepares rows for weights of a format."""
    rows = ROW_FORMATS[PREPARATION[format]]
    return dict(out=(X * rows.width(width), rows.dtype), width=width, top_k=X, preparation=PREPARATION[format])


def experts_of(random, format="f32", D=D):
    """A stored matrix [N, D] for each expert: of a format in STORED, or of float16 numbers."""
    if format in STORED:
        return tuple(stored(f"expert {e}", (N, D), format) for e in range(E))
    values = random.standard_normal((E, N, D)).astype(np.float16).astype(np.float32)
    return tuple(StoredTensor(f"expert {e}", "f32", (N, D), values[e]) for e in range(E))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("T", [1, 7, 33])
def test_experts(format, T):
    random, (order, start) = np.random.RandomState(T), routed(T, 5)
    D = max(64, FORMATS[format].block_size)
    x = random.standard_normal((T, D)).astype(np.float32)
    parts = experts_of(random, format, D)
    weights = Weight("experts", format, (E * N, D), parts)
    h = both(ExpertRows, T, x=x, order=order, **prepared(format, D))
    shape = dict(width=D, features=N, num_experts=E, top_k=X)
    linear = dict(x=h, expert_start=start, weight=weights, **shape)
    out = both(ExpertLinear, T, **linear)
    bias = Weight("b", "f32", (E, N), (StoredTensor("b", "f32", (E, N), random.rand(E, N).astype(np.float32)),))
    biases = dict(x=out, order=order, expert_ids=ids_of(order, start), bias=bias, width=N, num_experts=E, top_k=X)
    same_bits(both(ExpertLinear, T, bias=bias, **linear), both(ExpertBias, T, **biases))
    if N // 2 % 32 == 0 or not PREPARATION[format]:
        for activation in GATES:
            both(ExpertGated, T, x=out, activation=activation, **prepared(format, N // 2))
    pairs = both(ExpertScatter, T, x=out, order=order, width=N, top_k=X).reshape(T, X, N)
    exact = dense(x, parts, order.reshape(-1), start[0])
    assert np.abs(pairs - exact).max() < TOLERANCE.get(format, 0.05)


def test_experts_are_cut_finer_for_many_threads():
    (order, start), x = routed(7, 5), np.random.RandomState(7).standard_normal((7, D)).astype(np.float32)
    parts = experts_of(np.random.RandomState(1), "q8_0")
    operands = dict(expert_start=start, weight=Weight("experts", "q8_0", (E * N, D), parts))
    operands |= dict(x=both(ExpertRows, 7, x=x, order=order, **prepared("q8_0", D)), width=D, features=N)
    step, _held = ragged_step([7])
    run = lambda table, threads: run_op(table, ExpertLinear, step, threads, num_experts=E, top_k=X, **operands)["out"]
    assert interpreted(experts_cpu.claim_panels)(N // 16, 3, 20) == 2
    same_bits(run(experts_cpu.CPU, 20), run(experts.REFERENCE, 1))


def dense(x, parts, order, start):
    """In float64: y[token, rank] = W[expert] x[token]."""
    y = np.empty((len(x), X, N))
    for e in range(E):
        for pair in order[start[e] : start[e + 1]]:
            y[pair // X, pair % X] = parts[e].to_f32().astype(np.float64) @ x[pair // X]
    return y


def test_a_row_is_that_of_an_ordinary_linear_layer():
    random, (order, start) = np.random.RandomState(0), routed(9, 5)
    x = random.standard_normal((9, D)).astype(np.float32)
    parts = experts_of(random)
    step, _held = ragged_step([9])
    rows = run_op(experts_cpu.CPU, ExpertRows, step, x=x, order=order, **prepared("f32", D))["out"]
    weights, shape = Weight("experts", "f32", (E * N, D), parts), dict(width=D, features=N, num_experts=E, top_k=X)
    out = run_op(experts_cpu.CPU, ExpertLinear, step, x=rows, expert_start=start, weight=weights, **shape)["out"]
    for s, row in enumerate(out.reshape(-1, N)):
        e = int(np.searchsorted(start[0], s, "right")) - 1
        pair = int(order.reshape(-1)[s])
        same_bits(row, np.array([products.dot_f32(x[pair // X], w) for w in parts[e].data], np.float32))


@pytest.mark.parametrize("T", [1, 7, 33])
def test_biases(T):
    """Each row gets those of its expert, of all parts side by side."""
    random, (order, start) = np.random.RandomState(T), routed(T, 6)
    ids, biases = ids_of(order, start), random.standard_normal((E, N)).astype(np.float32)
    widths, at = {"gate": 64, "up": 32}, {"gate": slice(64), "up": slice(64, N)}
    parts = [StoredTensor(name, "f32", (E, width), biases[:, at[name]].copy()) for name, width in widths.items()]
    x, weight = random.standard_normal((T, X * N)).astype(np.float32), Weight("biases", "f32", (E, N), tuple(parts))
    shape = dict(width=N, num_experts=E, top_k=X)
    out = both(ExpertBias, T, x=x, order=order, expert_ids=ids, bias=weight, **shape)
    expected = x.reshape(-1, N) + biases[ids.reshape(-1)[order.reshape(-1)]]
    same_bits(out.reshape(-1, N), expected)


@pytest.mark.parametrize("wrong", [-1, 6, 2**31 - 1, -(2**31)])
def test_a_place_that_is_none_counts_as_the_last_one(wrong):
    """Of 3 tokens with 2 experts each: pairs are 0 .. 5, and an expert's rows end at 6 at most."""
    T, random = 3, np.random.RandomState(2)
    order, start = routed(T, 5)
    ids, broken = np.full((T, X), 3, np.int32), order.copy()
    broken[1, 0], order[1, 0] = wrong, 5
    x, pairs = random.standard_normal((T, D)).astype(np.float32), random.standard_normal((T, X * N)).astype(np.float32)
    bias = Weight("b", "f32", (E, N), (StoredTensor("b", "f32", (E, N), random.rand(E, N).astype(np.float32)),))
    shape, sizes = dict(width=N, top_k=X), dict(num_experts=E, top_k=X)
    same_bits(
        both(ExpertRows, T, x=x, order=broken, **prepared("f32", D)),
        both(ExpertRows, T, x=x, order=order, **prepared("f32", D)),
    )
    found = both(ExpertBias, T, x=pairs, order=broken, expert_ids=np.full_like(ids, wrong), bias=bias, width=N, **sizes)
    same_bits(found, both(ExpertBias, T, x=pairs, order=order, expert_ids=ids, bias=bias, width=N, **sizes))
    # equal rows: which of several rows with one place is written last is up to the threads
    broken, order = (np.full((T, X), place, np.int32) for place in (wrong, 5))
    same = np.broadcast_to(pairs[0, :N], (T, X, N)).reshape(T, X * N).copy()
    same_bits(
        both(ExpertScatter, T, x=same, order=broken, **shape), both(ExpertScatter, T, x=same, order=order, **shape)
    )
    rows = both(ExpertRows, T, x=x, order=np.arange(T * X, dtype=np.int32).reshape(T, X), **prepared("f32", D))
    weight, ends = Weight("experts", "f32", (E * N, D), experts_of(random)), start.copy()
    start[0, E], ends[0, E] = wrong, T * X
    linear = dict(x=rows, weight=weight, width=D, features=N, **sizes)
    same_bits(both(ExpertLinear, T, expert_start=start, **linear), both(ExpertLinear, T, expert_start=ends, **linear))


def test_rows_that_are_not_prepared_for_the_weights_are_refused():
    order, small = Tensor("order", "T", X, "i32"), dict(width=32, top_k=X)
    with pytest.raises(ValueError, match=r"ExpertRows: out is o f32.T, 64., expected i8.T, 96."):
        ExpertRows(out=Tensor("o", "T", 64), x=Tensor("x", "T", 32), order=order, preparation="quantize_q8", **small)
    with pytest.raises(ValueError, match="ExpertGated: preparation is 'q7', expected one of '', 'quantize_q8'"):
        gated = dict(preparation="q7", activation="silu", **small)
        ExpertGated(out=Tensor("o", "T", 64), x=Tensor("x", "T", 128), **gated)
    small.update(features=16, num_experts=E, weight=Weight("w", "q8_0", (E * 16, 32), ()))
    with pytest.raises(ValueError, match=r"ExpertLinear: x is x f32.T, 64., expected i8.T, 96."):
        start = Tensor("start", "T", E + 1, "i32")
        ExpertLinear(out=Tensor("o", "T", 32), x=Tensor("x", "T", 64), expert_start=start, **small)
    small["weight"] = Weight("w", "f32", (E * 16, 32), ())
    with pytest.raises(ValueError, match="ExpertLinear: features is 16, expected a multiple of 32"):
        ExpertLinear(out=Tensor("o", "T", 32), x=Tensor("x", "T", 64), expert_start=start, **small)
