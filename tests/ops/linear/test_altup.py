"""Four streams, and gates of which most are zero: kernels equal the definitions, which are accurate."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.linear import altup, altup_cpu, sparse_gate, sparse_gate_cpu
from lockstep.ops.linear.altup import AltupCorrect, AltupPredict, MatchRms
from lockstep.ops.linear.sparse_gate import SparseGate
from tests.ops.harness import run_op, same_bits

RNG = np.random.default_rng(0)
FLOOR, DEVIATIONS = np.float32(1e-5), np.float32(0.7)
SHAPES = [(1, 16), (5, 48), (17, 256)]


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def match(backend, x, like, num_threads=1):
    sizes = dict(width=x.shape[1], floor=float(FLOOR))
    return run_op(backend, MatchRms, num_threads=num_threads, x=x, like=like, **sizes)["out"]


def predict(backend, x, logits, coefs, num_threads=1):
    streams = {f"x{j}": one for j, one in enumerate(x)}
    sizes = dict(width=x.shape[2], logits_width=logits.shape[1])
    found = run_op(backend, AltupPredict, num_threads=num_threads, **streams, logits=logits, coefs=coefs, **sizes)
    return np.stack([found[f"out{j}"] for j in range(4)])


def correct(backend, p, y, logits, coefs, scale, num_threads=1):
    streams = {f"p{j}": one for j, one in enumerate(p)} | dict(y=y, logits=logits, coefs=coefs, scale=scale)
    sizes = dict(width=p.shape[2], logits_width=logits.shape[1])
    found = run_op(backend, AltupCorrect, num_threads=num_threads, **streams, **sizes)
    return np.stack([*(found[f"out{j}"] for j in range(4)), found["first"]])


def gate(backend, x, num_threads=1):
    sizes = dict(width=x.shape[1] // 2, deviations=float(DEVIATIONS))
    return run_op(backend, SparseGate, num_threads=num_threads, x=x, **sizes)["out"]


def given(num_tokens, width):
    """Arguments of each op."""
    x, logits = normal(4, num_tokens, width), normal(num_tokens, 16)
    y = normal(num_tokens, width)
    return {
        match: (x[0], 3 * x[1]),
        predict: (x, logits, normal(16, 4)),
        correct: (x, y, logits, normal(4, 4), normal(width)),
        gate: (normal(num_tokens, 2 * width),),
    }


TABLES = {run: (altup, altup_cpu) for run in (match, predict, correct)} | {gate: (sparse_gate, sparse_gate_cpu)}


@pytest.mark.parametrize("num_tokens, width", SHAPES)
@pytest.mark.parametrize("run", TABLES, ids=lambda run: run.__name__)
def test_kernels_equal_definitions(run, num_tokens, width):
    arrays, (definitions, kernels) = given(num_tokens, width)[run], TABLES[run]
    expected = run(definitions.REFERENCE, *arrays)
    assert np.isfinite(expected).all()
    same_bits(run(kernels.CPU, *arrays, num_threads=3), expected)
    same_bits(run(kernels.PER_TOKEN, *arrays, num_threads=2), expected)


def test_a_row_gets_the_size_of_another():
    x, like = normal(4, 64), 3 * normal(4, 64)
    x[1] *= 1e-4  # below the floor: its mean square is taken for 1e-5
    found, wide = match(altup.REFERENCE, x, like), x.astype(np.float64)
    size = np.sqrt(np.maximum((wide**2).mean(-1, keepdims=True), 1e-5))
    exact = wide * np.sqrt((like.astype(np.float64) ** 2).mean(-1, keepdims=True)) / size
    assert (np.abs(found - exact) <= 6 * np.spacing(np.abs(exact).astype(np.float32))).all()
    out = np.empty_like(x)
    interpreted(altup.match_rms)(x, like, FLOOR, out)
    same_bits(found, out)


def test_predictions_are_accurate_and_equal_interpreted():
    x, logits, coefs = given(3, 16)[predict]
    found, wide = predict(altup.REFERENCE, x, logits, coefs), x.astype(np.float64)
    c = (np.tanh(logits[:, :4].astype(np.float64)) @ coefs.T).reshape(3, 4, 4)  # [token, stream, of stream]
    exact = wide + np.einsum("tji,itd->jtd", c, wide)
    size = np.abs(wide) + np.einsum("tji,itd->jtd", np.abs(c), np.abs(wide))
    assert (np.abs(found - exact) <= 16 * np.spacing(size.astype(np.float32))).all()
    out = np.empty_like(x)
    interpreted(altup.altup_predict)(x, logits, coefs, out)
    same_bits(found, out)


def test_corrections_are_accurate_and_equal_interpreted():
    p, y, logits, coefs, scale = given(3, 16)[correct]
    found = correct(altup.REFERENCE, p, y, logits, coefs, scale)
    c = 1 + np.tanh(logits[:, :4].astype(np.float64)) @ coefs.T
    change = y.astype(np.float64) - p[0]
    exact = p + np.einsum("tj,td->jtd", c, change)
    exact = np.concatenate([exact, exact[:1] * scale])
    size = np.abs(exact) + np.abs(np.einsum("tj,td->jtd", c, change)).max(0)
    assert (np.abs(found - exact) <= 16 * np.spacing(size.astype(np.float32))).all()
    out, first = np.empty_like(p), np.empty_like(y)
    interpreted(altup.altup_correct)(p, y, logits, coefs, scale, out, first)
    same_bits(found, np.concatenate([out, first[None]]))


def test_sparse_gates_are_accurate_and_equal_interpreted():
    [x] = given(3, 64)[gate]
    found, wide = gate(sparse_gate.REFERENCE, x), x.astype(np.float64)
    gates, up = wide[:, :64], wide[:, 64:]
    g = np.maximum(gates - gates.mean(-1, keepdims=True) - 0.7 * gates.std(-1, keepdims=True), 0)
    exact = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up
    assert np.abs(found - exact).max() <= 4e-6 and 0.6 < (found == 0).mean() < 0.9
    out = np.empty((3, 64), np.float32)
    interpreted(sparse_gate.sparse_gate)(x, DEVIATIONS, out)
    same_bits(found, out)
