"""Drafts in the gated delta rule: whatever the drafts and however many are accepted, states and rows have the bits that
they have when tokens come one by one."""

import numpy as np
import pytest

from lockstep.native.kernel import interpreted
from lockstep.ops.recurrent import conv1d, conv1d_cpu, gated_delta_verify, gated_delta_verify_cpu
from lockstep.ops.recurrent.conv1d import Requests
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify, GatedDeltaVerify
from lockstep.runtime.backend import Implementation
from tests.ops.harness import ragged_step, run_op, same_bits
from tests.ops.recurrent.test_conv1d import floats
from tests.ops.recurrent.test_gated_delta import CPU as PLAIN
from tests.ops.recurrent.test_gated_delta import inputs, inputs_of, prepared, recur, rule_of, state_shape

MAX_DRAFTS = 7
PLAIN_INPUTS = conv1d_cpu.CPU["delta_inputs"]
KERNELS = {
    "definition": gated_delta_verify.REFERENCE["gated_delta_verify"],
    "two": Implementation(gated_delta_verify_cpu.gated_delta_verify_two),
    "four": Implementation(gated_delta_verify_cpu.gated_delta_verify_four),
    "per_token": gated_delta_verify_cpu.PER_TOKEN["gated_delta_verify"],
}
SHAPES = [(1, 2, 16, 48), (2, 4, 32, 16), (1, 3, 128, 64), (1, 1, 256, 112)]


class Memory:
    """State and records of some slots, all NaN at first."""

    def __init__(self, shape, slots=4):
        G, H, K, V = self.shape = shape
        self.state = np.full((slots, *state_shape(H, K, V)), np.nan, np.float32)
        self.records = np.full((slots, 2 * MAX_DRAFTS + 1, H * V + G * K + H), np.nan, np.float32)

    def run(self, kernel, arrays, lengths, drafts, pending, num_threads=1, **requests):
        """The output of a step; state and records are changed."""
        qk, v, gates = arrays
        step, _held = ragged_step(lengths, num_drafts=drafts, num_pending=pending, **requests)
        given = dict(qk=qk, v=v, gates=gates, state=self.state, records=self.records, num_records=2 * MAX_DRAFTS + 1)
        return run_op(kernel, GatedDeltaVerify, step, num_threads, **given, **rule_of(self.shape, qk, v, 8))["out"]


def wrong(arrays, rows, shape):
    """The arrays with other numbers in some rows."""
    made = [a.copy() for a in arrays]
    for a, other in zip(made, inputs(len(arrays[0]), *shape), strict=True):
        a[rows] = other[rows]
    return made


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rejected_and_accepted_drafts_leave_the_bits_of_single_tokens(kernel, shape):
    total = 70
    arrays = inputs(total, *shape)
    none = np.full((1, *state_shape(*shape[1:])), np.nan, np.float32)
    whole, _ = recur(PLAIN, arrays, none, shape)
    memory, rng, at, pending = Memory(shape), np.random.default_rng(5), 0, 0
    while at < total:
        certain = int(rng.integers(1, 12)) if pending == 0 else 1
        certain = min(certain, total - at)
        drafts = int(min(rng.integers(0, MAX_DRAFTS + 1), total - at - certain))
        accepted = int(rng.integers(0, drafts + 1))
        end = at + certain + drafts
        step = wrong([a[at:end] for a in arrays], np.arange(certain + accepted, certain + drafts), shape)
        where = dict(contexts=[end], state_slot=[2])
        out = memory.run(KERNELS[kernel], step, [certain + drafts], [drafts], [pending], 3, **where)
        same_bits(out[: certain + accepted], whole[at : at + certain + accepted])
        after = recur(PLAIN, [a[: at + certain] for a in arrays], none, shape)[1]
        same_bits(memory.state[2:3], after)
        at, pending = at + certain + accepted, accepted
    assert np.isnan(memory.state[[0, 1, 3]]).all() and np.isnan(memory.records[[0, 1, 3]]).all()


@pytest.mark.parametrize("kernel", ["two", "four", "per_token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_equals_definition_in_a_ragged_batch(kernel, shape):
    """Requests with and without drafts, pending or not, records included."""
    rng, made = np.random.default_rng(2), []
    lengths, drafts, pending = [1, 9, 3, 33], [0, 7, 2, 0], [5, 0, 7, 0]
    arrays = inputs(sum(lengths), *shape)
    start = Memory(shape, slots=6)
    start.state[...] = rng.standard_normal(start.state.shape)
    start.records[...] = rng.standard_normal(start.records.shape)
    where = dict(contexts=[40, 1009, 23, 33], state_slot=[4, 0, 5, 2])
    for each in ("definition", kernel):
        memory = Memory(shape, slots=6)
        memory.state[...], memory.records[...] = start.state, start.records
        out = memory.run(KERNELS[each], arrays, lengths, drafts, pending, 2, **where)
        made.append((out, memory.state, memory.records))
    for found, expected in zip(*reversed(made), strict=True):
        same_bits(found, expected)


def test_heads_that_do_not_fit_the_kernels_memory_are_refused():
    shape = (1, 1, 272, 16)
    with pytest.raises(ValueError, match="GatedDeltaVerify: expected k_head_dim <= 256, got k_head_dim 272"):
        Memory(shape).run(KERNELS["definition"], inputs(1, *shape), [1], [0], [0])


def test_without_drafts_it_is_the_plain_op():
    shape = (2, 4, 32, 48)
    arrays, none = inputs(42, *shape), np.full((4, *state_shape(*shape[1:])), np.nan, np.float32)
    lengths = [1, 33, 3, 5]
    memory = Memory(shape)
    found = memory.run(KERNELS["four"], arrays, lengths, [0] * 4, [0] * 4, 2)
    expected = recur(PLAIN, arrays, none, shape, lengths=lengths)
    same_bits(found, expected[0])
    same_bits(memory.state, expected[1])
    assert np.isnan(memory.records).all()


INPUTS = {
    "definition": gated_delta_verify.REFERENCE["delta_inputs_verify"],
    "cpu": conv1d_cpu.CPU["delta_inputs_verify"],
}


def prepared_in_steps(kernel, x, arrays, shape, history, num_threads=1, **requests):
    """(convolved and normalised rows, gates) of a step; the history, a ring [slots, rows, C], is changed."""
    (w, a_log, dt_bias), C = arrays, len(arrays[0])
    step, _held = ragged_step(**requests)
    given = dict(x=x, weight=w, a_log=a_log, dt_bias=dt_bias, state=history, num_rows=history.shape[1])
    where = inputs_of(shape, x, 4, 4 + C, 4 + C + shape[1])
    made = run_op(kernel, DeltaInputsVerify, step, num_threads, **given, **where)
    return made["out"], made["gates"]


@pytest.mark.parametrize("kernel", INPUTS)
@pytest.mark.parametrize("shape", [(1, 2, 16, 48), (2, 4, 128, 64)])
def test_the_convolution_forgets_rejected_drafts(kernel, shape):
    G, H, K, V = shape
    C, total = 2 * G * K + H * V, 60
    x, arrays = floats(total, C + 2 * H + 8), (floats(C, 4), floats(H), floats(H))
    none = np.full((1, 3, C), np.nan, np.float32)
    u, gates, _ = prepared(PLAIN_INPUTS, x, arrays, shape, none, lengths=[total])
    history, rng, at = np.full((3, 3 + MAX_DRAFTS, C), np.nan, np.float32), np.random.default_rng(6), 0
    while at < total:
        certain = min(int(rng.integers(1, 3)), total - at) if rng.random() < 0.9 else min(25, total - at)
        drafts = int(min(rng.integers(0, MAX_DRAFTS + 1), total - at - certain))
        kept = certain + int(rng.integers(0, drafts + 1))
        rows = x[at : at + certain + drafts].copy()
        rows[kept:] = floats(*rows[kept:].shape)
        where = dict(lengths=[len(rows)], contexts=[at + len(rows)], state_slot=[1])
        found = prepared_in_steps(INPUTS[kernel], rows, arrays, shape, history, 2, **where)
        same_bits(found[0][:kept], u[at : at + kept])
        same_bits(found[1][:kept], gates[at : at + kept])
        at += kept
    assert np.isnan(history[[0, 2]]).all()


def test_convolution_kernel_equals_definition_in_a_ragged_batch():
    shape = (1, 2, 32, 48)
    C, lengths, contexts = 2 * 32 + 2 * 48, [1, 33, 2, 1, 9], [1, 33, 3, 70, 1000]
    x, arrays = floats(sum(lengths), C + 12), (floats(C, 4), floats(2), floats(2))
    start, made = floats(7, 3 + MAX_DRAFTS, C), []
    for kernel in INPUTS:
        history = start.copy()
        where = dict(lengths=lengths, contexts=contexts, state_slot=[5, 0, 3, 2, 6])
        made.append((*prepared_in_steps(INPUTS[kernel], x, arrays, shape, history, 3, **where), history))
    for found, expected in zip(*made, strict=True):
        same_bits(found, expected)


def test_definitions_compiled_equal_interpreted():
    x, w, ring = floats(6, 20), floats(16, 4), floats(2, 6, 16)
    requests = Requests(*(np.array(a, np.int32) for a in ([0, 2, 6], [0, 1, 7, 8, 9, 10], [1, 0])))
    made = []
    for run in (conv1d.conv1d_ring, interpreted(conv1d.conv1d_ring)):
        out, after = np.full((6, 16), np.nan, np.float32), ring.copy()
        run(x, 3, w, requests, after, out)
        made.append((out, after))
    G, H, K, V = shape = 1, 2, 16, 16
    (qk, v, gates), state, records = inputs(6, *shape), floats(2, *state_shape(H, K, V)), floats(2, 9, H * V + K + H)
    drafts = gated_delta_verify.Drafts(np.array([1, 3], np.int32), np.array([0, 4], np.int32))
    for run in (gated_delta_verify.gated_delta_verify, interpreted(gated_delta_verify.gated_delta_verify)):
        out, after, kept = np.empty((6, H, V), np.float32), state.copy(), records.copy()
        run((qk, v, 8, gates), G, requests, drafts, after, kept, out)
        made.append((out, after, kept))
    for compiled, plain in (made[:2], made[2:]):
        for a, b in zip(compiled, plain, strict=True):
            same_bits(a, b)
