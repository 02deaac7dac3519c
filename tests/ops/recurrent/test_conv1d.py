"""The causal convolution and softplus: kernels equal definitions, and definitions are accurate."""

import numpy as np
import pytest

from lockstep.native.kernel import definition, interpreted
from lockstep.ops.math import softplus
from lockstep.ops.recurrent import conv1d, conv1d_cpu
from lockstep.ops.recurrent.conv1d import Conv1d, Requests
from tests.ops.harness import ragged_step, run_op, same_bits

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def poisoned(num_slots, shape, slots, contexts, lengths):
    """State that is NaN but for the slots from which a request goes on."""
    state = np.full((num_slots, *shape), np.nan, np.float32)
    for slot, context, length in zip(slots, contexts, lengths, strict=True):
        if context > length:
            state[slot] = floats(*shape)
    return state


def convolve(backend, x, w, state, offset=0, num_threads=1, **requests):
    """(out, state after) of one step; state is not changed."""
    state = state.copy()
    step, _held = ragged_step(**requests)
    sizes = dict(row_width=x.shape[1], offset=offset, channels=w.shape[0], conv_width=w.shape[1])
    return run_op(backend, Conv1d, step, num_threads, x=x, weight=w, state=state, **sizes)["out"], state


@pytest.mark.parametrize(
    "lengths, contexts",
    [
        ([1], [1]),
        ([1], [9]),
        ([2], [2]),
        ([97], [97]),
        ([97], [131]),
        ([1, 2, 3, 1, 1], [1, 5, 3, 40, 2]),
        ([15, 1, 1, 33, 1, 17], [15, 7, 2, 70, 300, 17]),
        ([1] * 9, [1, 2, 3, 4, 9, 40, 1, 300, 5]),  # one and two threads take requests, five channels
    ],
)
@pytest.mark.parametrize("channels, width", [(16, 2), (48, 4), (1040, 4), (2064, 3), (528, 8)])
def test_kernel_equals_definition(lengths, contexts, channels, width):
    slots = RNG.permutation(9)[: len(lengths)]
    x, w = floats(sum(lengths), channels + 40), floats(channels, width)
    state = poisoned(9, (width - 1, channels), slots, contexts, lengths)
    requests = dict(lengths=lengths, contexts=contexts, state_slot=slots, offset=24)
    expected = convolve(conv1d.REFERENCE, x, w, state, **requests)
    assert np.isfinite(expected[0]).all() and np.isfinite(expected[1][slots]).all()
    for num_threads in (1, 2, 5):
        for found, wanted in zip(
            convolve(conv1d_cpu.CPU, x, w, state, num_threads=num_threads, **requests), expected, strict=True
        ):
            same_bits(found, wanted)


def test_every_cut_gives_the_same_rows_and_state():
    x, w = floats(40, 32), floats(32, 4)
    whole, end = convolve(conv1d_cpu.CPU, x, w, np.full((1, 3, 32), np.nan, np.float32), lengths=[40])
    for cut in range(1, 40):
        first, state = convolve(conv1d_cpu.CPU, x[:cut], w, np.full((1, 3, 32), np.nan, np.float32), lengths=[cut])
        second, state = convolve(conv1d_cpu.CPU, x[cut:], w, state, lengths=[40 - cut], contexts=[40])
        same_bits(np.concatenate([first, second]), whole)
        same_bits(state, end)


def test_definition_compiled_equals_interpreted():
    x, w, state = floats(5, 20), floats(16, 4), floats(2, 3, 16)
    requests = Requests(*(np.array(a, np.int32) for a in ([0, 2, 5], [0, 1, 7, 8, 9], [1, 0])))
    results = []
    for run in (conv1d.conv1d, interpreted(conv1d.conv1d)):
        out, after = np.full((5, 16), np.nan, np.float32), state.copy()
        run(x, 3, w, requests, after, out)
        results.append((out, after))
    same_bits(results[0][0], results[1][0])
    same_bits(results[0][1], results[1][1])


def test_definition_is_accurate():
    x, w = floats(60, 32), floats(32, 4)
    padded = np.concatenate([np.zeros((3, 32)), x]).astype(np.float64)
    sums = sum(padded[j : j + 60] * w[:, j] for j in range(4))
    out, state = convolve(conv1d.REFERENCE, x, w, np.full((1, 3, 32), np.nan, np.float32), lengths=[60])
    assert np.abs(out - sums / (1 + np.exp(-sums))).max() < 2e-6
    same_bits(state[0], x[-3:])


@definition
def _softplus(x, out):
    for i in range(x.shape[0]):
        out[i] = softplus(x[i])


def test_softplus_is_accurate_and_the_same_interpreted():
    x = np.concatenate([np.linspace(-86, 100, 20001), RNG.standard_normal(20000) * 4]).astype(np.float32)
    out, slow = np.empty_like(x), np.empty(400, np.float32)
    _softplus(x, out)
    exact = np.logaddexp(0, x.astype(np.float64))
    assert (np.abs(out - exact) / np.spacing(exact.astype(np.float32))).max() < 3
    interpreted(_softplus)(x[::100][:400], slow)
    same_bits(slow, out[::100][:400])
    extremes, out = np.array([-1e30, -200, -88, 1e30], np.float32), np.empty(4, np.float32)
    _softplus(extremes, out)
    assert out.tolist() == [0, 0, 0, np.float32(1e30)]
