"""The experts' linear layers: fast kernels equal definitions bit for bit, and each row is the row of an ordinary
linear layer."""

import numpy as np
import pytest

from lockstep.engine.selfcheck import stored
from lockstep.models.record import expert_rows
from lockstep.ops import experts, experts_cpu, linear
from lockstep.runtime.program import Weight
from lockstep.weights.tensor import StoredTensor
from tests.ops.harness import ragged_step, run_row, same_bits

E, X, D, N = 4, 2, 64, 96
STORED = ("q4_1", "q5_0", "q5_1", "q5_k")  # formats that nothing is quantized to
TOLERANCE = {"f32": 1e-4, "f16": 1e-4, "bf16": 0.4, "q8_0": 0.5, "q4_0": 5}  # of STORED 0.05: their weights are exact


def routed(T, seed):
    """(order, expert_start) of T tokens that never choose expert 1."""
    ids = np.array([np.random.RandomState(seed + t).permutation([0, 2, 3])[:X] for t in range(T)]).reshape(-1)
    order = np.argsort(ids, kind="stable").astype(np.int32).reshape(T, X)
    start = np.zeros((T, E + 1), np.int32)
    start[0] = np.searchsorted(np.sort(ids), np.arange(E + 1))
    return order, start


def both(kind, outputs, inputs, T, **params):
    """The outputs of definition and kernel, which must be the same bits for several thread counts."""
    step, _held = ragged_step([T])
    expected = run_row(experts.REFERENCE[kind], outputs, inputs, step, **params)["out"]
    for threads in (1, 3):
        same_bits(run_row(experts_cpu.CPU[kind], outputs, inputs, step, threads, **params)["out"], expected)
    return expected


def experts_of(random, format="f32", D=D):
    """A stored matrix [N, D] for each expert: of a format in STORED, or of float16 numbers."""
    if format in STORED:
        return tuple(stored(f"expert {e}", (N, D), format) for e in range(E))
    values = random.standard_normal((E, N, D)).astype(np.float16).astype(np.float32)
    return tuple(StoredTensor(f"expert {e}", "f32", (N, D), values[e]) for e in range(E))


@pytest.mark.parametrize("format", ["f32", "bf16", "q8_0", "q4_0", "f16", *STORED])
@pytest.mark.parametrize("T", [1, 7, 33])
def test_experts(format, T):
    random, (order, start) = np.random.RandomState(T), routed(T, 5)
    D = 256 if format == "q5_k" else 64
    x = random.standard_normal((T, D)).astype(np.float32)
    parts = experts_of(random, format, D)
    weights = Weight("experts", format, (E * N, D), parts)
    rows, width = expert_rows(format, D)
    element = "f32" if rows == "f32" else "i8"
    prepared = both(f"expert_rows_{rows}", {"out": ("T", X * width, element)}, [x, order], T, K=D, top_k=X)
    out = both(
        f"expert_linear_{format}", {"out": ("T", X * N, "f32")}, [prepared, start, weights], T, K=D, N=N, num_experts=E
    )
    gate_rows, gate_width = expert_rows(format, N // 2)
    both(
        f"expert_gated_{gate_rows}",
        {"out": ("T", X * gate_width, "f32" if gate_rows == "f32" else "i8")},
        [out],
        T,
        K=N // 2,
        top_k=X,
    ) if N // 2 % 32 == 0 or gate_rows == "f32" else None
    pairs = both("expert_scatter", {"out": ("T", X * N, "f32")}, [out, order], T, D=N, top_k=X).reshape(T, X, N)
    exact = dense(x, parts, order.reshape(-1), start[0])
    assert np.abs(pairs - exact).max() < TOLERANCE.get(format, 0.05)


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
    rows = run_row(experts_cpu.CPU["expert_rows_f32"], {"out": ("T", X * D, "f32")}, [x, order], step, K=D, top_k=X)[
        "out"
    ]
    found = run_row(
        experts_cpu.CPU["expert_linear_f32"],
        {"out": ("T", X * N, "f32")},
        [rows, start, Weight("experts", "f32", (E * N, D), parts)],
        step,
        K=D,
        N=N,
        num_experts=E,
    )["out"]
    for s, row in enumerate(found.reshape(-1, N)):
        e = int(np.searchsorted(start[0], s, "right")) - 1
        pair = int(order.reshape(-1)[s])
        same_bits(row, np.array([linear.dot_f32(x[pair // X], w) for w in parts[e].data], np.float32))
