"""The gated delta rule and what prepares its inputs: kernels equal definitions, whatever threads, cuts and order."""

import pathlib

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.recurrent import conv1d, conv1d_cpu, gated_delta, gated_delta_cpu, gated_norm_cpu
from lockstep.ops.recurrent.conv1d import Requests
from lockstep.ops.recurrent.gated_delta import DeltaGates, DeltaInputs, GatedDelta, L2Norm
from lockstep.ops.recurrent.gated_norm import GatedNorm
from lockstep.runtime.backend import Implementation
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.recurrent.test_conv1d import convolve, floats, poisoned

RNG = np.random.default_rng(0)
REFERENCE, CPU = gated_delta.REFERENCE["gated_delta"], gated_delta_cpu.CPU["gated_delta"]
KERNELS = {
    "two": Implementation(gated_delta_cpu.gated_delta_two),
    "four": Implementation(gated_delta_cpu.gated_delta_four),
    "per_token": gated_delta_cpu.PER_TOKEN["gated_delta"],
}
RAGGED = dict(lengths=[1, 33, 1, 2, 5], contexts=[1, 33, 20, 2, 70])
SHAPES = [
    (1, 1, 16, 16),
    (2, 4, 32, 48),
    (1, 4, 48, 80),
    (3, 3, 64, 64),
    (1, 2, 128, 128),
    (1, 1, 16, 256),
    (1, 1, 256, 112),
]


def inputs(num_tokens, G, H, K, V, spare=8):
    """qk (normalised), v (with `spare` columns before and after it) and gates, like those of a trained model."""
    qk = floats(num_tokens, 2 * G, K)
    qk /= np.sqrt((qk**2).sum(-1, keepdims=True)) * np.where(np.arange(2 * G) < G, np.sqrt(K), 1)[:, None]
    gates = RNG.uniform(0, 1, (num_tokens, 2 * H)).astype(np.float32)
    gates[:, :H] = gates[:, :H] ** np.float32(0.1)
    return qk.astype(np.float32).reshape(num_tokens, -1), floats(num_tokens, H * V + 2 * spare), gates


def state_shape(H, K, V):
    return H, V // 16, K, 16


def recur(implementation, arrays, state, shape, num_threads=1, spare=8, **requests):
    """(out, state after) of one step; state is not changed."""
    (qk, v, gates), state = arrays, state.copy()
    step, _held = ragged_step(**(requests or dict(lengths=[len(qk)])))
    given = dict(qk=qk, v=v, gates=gates, state=state, **rule_of(shape, qk, v, spare))
    return run_op(implementation, GatedDelta, step, num_threads, **given)["out"], state


def rule_of(shape, qk, v, v_offset):
    """The numbers of a GatedDelta."""
    G, H, K, V = shape
    heads = dict(num_k_heads=G, num_v_heads=H, k_head_dim=K, v_head_dim=V)
    return dict(qk_width=qk.shape[1], v_width=v.shape[1], v_offset=v_offset, **heads)


def all_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_definition(kernel, shape):
    slots = RNG.permutation(8)[:5]
    state = poisoned(8, state_shape(*shape[1:]), slots, RAGGED["contexts"], RAGGED["lengths"])
    arrays = inputs(42, *shape)
    expected = recur(REFERENCE, arrays, state, shape, state_slot=slots, **RAGGED)
    assert np.isfinite(expected[0]).all() and np.isfinite(expected[1][slots]).all()
    for num_threads in (1, 3):
        all_same(recur(KERNELS[kernel], arrays, state, shape, num_threads, state_slot=slots, **RAGGED), expected)


@pytest.mark.parametrize("num_threads", [2, 4, 5])
def test_threads_and_order_of_requests_do_not_matter(num_threads):
    shape, starts = (1, 2, 32, 64), np.cumsum([0] + RAGGED["lengths"])
    state = poisoned(5, state_shape(*shape[1:]), range(5), RAGGED["contexts"], RAGGED["lengths"])
    arrays = inputs(42, *shape)
    expected = recur(CPU, arrays, state, shape, **RAGGED)
    order = [3, 0, 4, 1, 2]
    rows = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in order])
    out, after = recur(
        CPU,
        [a[rows] for a in arrays],
        state,
        shape,
        num_threads,
        state_slot=order,
        lengths=[RAGGED["lengths"][s] for s in order],
        contexts=[RAGGED["contexts"][s] for s in order],
    )
    all_same((out, after), (expected[0][rows], expected[1]))


def test_every_cut_gives_the_same_rows_and_state():
    shape = (1, 2, 16, 48)
    arrays, unused = inputs(40, *shape), np.full((1, *state_shape(*shape[1:])), np.nan, np.float32)
    whole = recur(CPU, arrays, unused, shape)
    for cut in range(1, 40):
        first, state = recur(CPU, [a[:cut] for a in arrays], unused, shape)
        second, state = recur(CPU, [a[cut:] for a in arrays], state, shape, lengths=[40 - cut], contexts=[40])
        all_same((np.concatenate([first, second]), state), whole)


def test_definition_compiled_equals_interpreted():
    G, H, K, V = shape = 1, 2, 16, 16
    qk, v, gates = inputs(4, *shape)
    requests = Requests(*(np.array(a, np.int32) for a in ([0, 1, 4], [0, 7, 8, 9], [1, 0])))
    results, state = [], floats(2, *state_shape(H, K, V))
    for run in (gated_delta.gated_delta, interpreted(gated_delta.gated_delta)):
        out, after = np.empty((4, H, V), np.float32), state.copy()
        run(qk, v, 8, gates, G, requests, after, out)
        results.append((out, after))
    all_same(*results)


def exact_recurrence(qk, v, gates, G, H, K, V, state):
    """The four lines of the rule in float64; state [H, K, V]."""
    q, k = (qk.astype(np.float64).reshape(-1, 2, G, K)[:, i].repeat(H // G, 1) for i in (0, 1))
    out = np.empty((len(q), H, V))
    for t in range(len(q)):
        state = state * gates[t, :H, None, None]
        delta = gates[t, H:, None] * (v[t].reshape(H, V) - np.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t][:, :, None] * delta[:, None]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    return out.reshape(len(q), -1), state


def test_definition_is_accurate():
    _G, H, K, V = shape = 1, 2, 64, 32
    arrays, state = inputs(1000, *shape, spare=0), np.full((1, *state_shape(H, K, V)), np.nan, np.float32)
    out, after = recur(REFERENCE, arrays, state, shape, spare=0)
    exact, end = exact_recurrence(*arrays, *shape, np.zeros((H, K, V)))
    assert np.abs(out - exact).max() < 2e-6 * np.abs(exact).max()
    assert np.abs(after[0].transpose(0, 2, 1, 3).reshape(H, K, V) - end).max() < 2e-6 * np.abs(end).max()


def normalised(backend, x, G, K, num_threads=1):
    sizes = dict(row_width=x.shape[1], num_k_heads=G, k_head_dim=K)
    return run_op(backend, L2Norm, num_threads=num_threads, x=x, **sizes)["out"]


def gates(backend, x, a_log, dt_bias, num_threads=1, a_offset=3, b_offset=None):
    H = a_log.size
    sizes = dict(row_width=x.shape[1], a_offset=a_offset, b_offset=b_offset or 5 + H, num_v_heads=H)
    return run_op(backend, DeltaGates, num_threads=num_threads, x=x, a_log=a_log, dt_bias=dt_bias, **sizes)["out"]


@pytest.mark.parametrize("G, K", [(1, 16), (3, 48), (4, 128)])
def test_l2_norm(G, K):
    x = floats(7, 2 * G * K + 24)
    expected = normalised(gated_delta.REFERENCE, x, G, K)
    same_bits(normalised(gated_delta_cpu.CPU, x, G, K, 3), expected)
    heads = x[:, : 2 * G * K].astype(np.float64).reshape(7, 2, G, K)
    exact = heads / np.sqrt((heads**2).sum(-1, keepdims=True) + 1e-6) * np.array([K**-0.5, 1])[:, None, None]
    assert (np.abs(expected.reshape(exact.shape) - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() < 4


@pytest.mark.parametrize("H", [1, 4, 16, 24, 48])
def test_delta_gates(H):
    x, a_log, dt_bias = floats(7, 2 * H + 9) * 5, floats(H) * 2, floats(H)
    expected = gates(gated_delta.REFERENCE, x, a_log, dt_bias)
    same_bits(gates(gated_delta_cpu.CPU, x, a_log, dt_bias, 3), expected)
    b = x[:, 5 + H : 5 + 2 * H].astype(np.float64)
    log_decay = -np.exp(a_log.astype(np.float64)) * np.logaddexp(0, x[:, 3 : 3 + H] + dt_bias)
    normal = log_decay > -80
    relative = np.abs(expected[:, :H][normal] / np.exp(log_decay[normal]) - 1)
    assert (relative < 2e-7 + 4e-7 * np.abs(log_decay[normal])).all()
    assert np.abs(expected[:, H:] * (1 + np.exp(-b)) - 1).max() < 4e-7
    extreme = gates(gated_delta_cpu.CPU, np.full((1, 2 * H + 9), 300, np.float32), a_log + 90, dt_bias)
    assert (extreme[:, :H] == 0).all() and (extreme[:, H:] == 1).all()
    assert (gates(gated_delta_cpu.CPU, np.full((1, 2 * H + 9), -300, np.float32), a_log, dt_bias)[:, :H] == 1).all()


def test_helpers_interpreted():
    x = floats(2, 40)
    for run in (gated_delta.l2_norm, interpreted(gated_delta.l2_norm)):
        run(x.copy(), 1, 16, out := np.empty((2, 32), np.float32))
        same_bits(out, normalised(gated_delta.REFERENCE, x, 1, 16))
    for run in (gated_delta.delta_gates, interpreted(gated_delta.delta_gates)):
        run(x * np.float32(3), 3, 9, x[0, :4], x[1, :4], out := np.empty((2, 8), np.float32))
        same_bits(out, gates(gated_delta.REFERENCE, x * np.float32(3), x[0, :4], x[1, :4]))


def prepared(backend, x, arrays, shape, state, num_threads=1, **requests):
    """(convolved and normalised rows, gates, state of the convolution after) of the fused op."""
    (w, a_log, dt_bias), C, state = arrays, len(arrays[0]), state.copy()
    step, _held = ragged_step(**requests)
    given = dict(x=x, weight=w, a_log=a_log, dt_bias=dt_bias, state=state)
    made = run_op(backend, DeltaInputs, step, num_threads, **given, **inputs_of(shape, x, 4, 4 + C, 4 + C + shape[1]))
    return made["out"], made["gates"], state


def inputs_of(shape, x, offset, a_offset, b_offset):
    """The numbers of a DeltaInputs, whose convolution has four weights a channel."""
    G, H, K, V = shape
    heads = dict(num_k_heads=G, k_head_dim=K, num_v_heads=H, channels=2 * G * K + H * V, conv_width=4)
    return dict(row_width=x.shape[1], offset=offset, a_offset=a_offset, b_offset=b_offset, **heads)


ONE_EACH = dict(lengths=[1] * 7, contexts=[1, 2, 3, 4, 9, 40, 1])  # threads take requests, not channels


@pytest.mark.parametrize("requests", [RAGGED, ONE_EACH], ids=["ragged", "one_each"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 16, 16), (2, 4, 128, 64), (3, 3, 48, 80), (1, 3, 256, 256), (8, 16, 128, 128)]
)
def test_fused_inputs_equal_the_ops_they_are_made_of(shape, requests):
    G, H, K, V = shape
    C, num_requests = 2 * G * K + H * V, len(requests["lengths"])
    x, arrays = floats(sum(requests["lengths"]), C + 2 * H + 8), (floats(C, 4), floats(H), floats(H))
    state = poisoned(num_requests, (3, C), range(num_requests), requests["contexts"], requests["lengths"])
    u, after = convolve(conv1d.REFERENCE, x, arrays[0], state, 4, **requests)
    u[:, : 2 * G * K] = normalised(gated_delta.REFERENCE, u, G, K)
    gate = gates(gated_delta.REFERENCE, x, *arrays[1:], a_offset=4 + C, b_offset=4 + C + H)
    all_same(prepared(gated_delta.REFERENCE, x, arrays, shape, state, **requests), (u, gate, after))
    for num_threads in (1, 3):
        fused = prepared(conv1d_cpu.CPU, x, arrays, shape, state, num_threads, **requests)
        all_same(fused, (u, gate, after))


def test_a_layer_gives_the_numbers_of_transformers():
    """Recorded by tests/golden/record_gated_delta.py."""
    golden = np.load(pathlib.Path(__file__).parents[2] / "golden" / "gated_delta.npz")
    G, H, K, V = (int(golden[n]) for n in ("num_k_heads", "num_v_heads", "k_size", "v_size"))
    C, x = 2 * G * K + H * V, golden["proj"]
    state, step, _held = np.full((1, *state_shape(H, K, V)), np.nan, np.float32), *ragged_step([len(x)])
    weights = dict(zip(("weight", "a_log", "dt_bias"), (golden[n] for n in ("conv", "a_log", "dt_bias")), strict=True))
    where = inputs_of((G, H, K, V), x, 0, C + H * V + H, C + H * V)
    history = np.full((1, 3, C), np.nan, np.float32)
    made = run_op(conv1d_cpu.CPU, DeltaInputs, step, x=x, state=history, **weights, **where)
    u, where = made["out"], rule_of((G, H, K, V), made["out"], made["out"], 2 * G * K)
    o = run_op(CPU, GatedDelta, step, qk=u, v=u, gates=made["gates"], state=state, **where)["out"]
    where = dict(row_width=x.shape[1], z_offset=C, num_heads=H, head_dim=V)
    out = run_op(gated_norm_cpu.CPU, GatedNorm, step, o=o, z=x, weight=golden["norm"], eps=1e-6, **where)["out"]
    assert np.abs(out - golden["out"]).max() < 5e-6
    assert np.abs(state[0].transpose(0, 2, 1, 3).reshape(H, K, V) - golden["state"]).max() < 2e-6
