"""Causal convolution, alone and fused with the rest that prepares inputs of the gated delta rule: the fast kernels.

Lanes are channels, so nothing is transposed: the weight is stored [J, C] and a row of 16 channels reads its J rows of x
where the projection wrote them. Bound by exp in silu while x is in cache, else by 8 bytes per channel and token.
A task is a run of channels through all requests, or all channels of a request, so that the thread that reads a
request's old state writes the new.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined, kernel, variant
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import fma, lanes, load, peek, poke, sqrt, store
from lockstep.ops.math import ONE, ZERO, silu
from lockstep.ops.recurrent.conv1d import Conv1d
from lockstep.ops.recurrent.gated_delta import DeltaInputs
from lockstep.ops.recurrent.gated_delta_cpu import gate_row, normalise_head
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify
from lockstep.runtime.backend import Implementation, Layout, raw_weight
from lockstep.runtime.step import StepBlock, entry

OP = RING_ROWS = None  # constants of a variant: the op; a function for the rows of a slot's ring, 0 without a ring
# of a task: the more, the fewer pages of memory are visited a second time; fewer where threads would have none
LEAST_CHANNELS, MOST_CHANNELS = 256, 1024
REQUESTS_OF_THREAD = 2  # from so many on, threads take requests instead of channels
TABLE = 144  # bytes of pairs of addresses: one for each of at most 8 weights, and an end


def taps(weight):
    """The weight as [J, C]; a vector stays as it is."""
    return (np.ascontiguousarray(raw_weight(weight)[0].T),)


@kernel
def conv1d(op, step, thread, num_threads):
    """Tasks are dealt to threads in turn."""
    a, batch = Conv1d.read(op), StepBlock.read(step)
    c, share = convolution(a, 0), share_of(batch, a.channels, 16, thread, num_threads)
    for channel in range(share.first_channel, a.channels, share.next_channel):
        convolve(batch, c, share, channel, min(share.width, a.channels - channel), Heads(0, 0, 16))


@inlined
def no_ring(a):
    return 0


@inlined
def ring_rows(a):
    return a.num_rows


def inputs(op, step, thread, num_threads):
    """Tasks of whole heads, whose q and k are normalised while they are in L1; then the gates of the thread's rows."""
    a, batch = OP.read(op), StepBlock.read(step)
    c, keys, K, H = convolution(a, RING_ROWS(a)), a.num_k_heads * a.k_head_dim, a.k_head_dim, a.num_v_heads
    share = share_of(batch, a.channels, K, thread, num_threads)
    for channel in range(share.first_channel, a.channels, share.next_channel):
        heads = Heads(keys - channel, 2 * keys - channel, K)
        convolve(batch, c, share, channel, min(share.width, a.channels - channel), heads)
    for t in range(thread, batch.num_tokens, num_threads):
        x = a.x + 4 * a.row_width * t
        gate_row(x + 4 * a.a_offset, x + 4 * a.b_offset, a.a_log, a.dt_bias, H, a.gates + 8 * H * t)


class Share(NamedTuple):
    """Which tasks a thread has: their channels, the first task's first one and from one task to the next; the first
    request, and from one to the next."""

    width: int
    first_channel: int
    next_channel: int
    first_request: int
    next_request: int


class Convolution(NamedTuple):
    """Addresses of x, weight [J, C], state and out; bytes of a row of x (x_row) and of the others (row); J; rows of the
    ring of state, 0 where state is the last J - 1 rows, oldest first."""

    x: int
    weight: int
    state: int
    out: int
    x_row: int
    row: int
    J: int
    ring: int


class Heads(NamedTuple):
    """Channels from a task's first on that are q, and that are q or k (none where negative); channels of a head."""

    num_q: int
    num_qk: int
    head_dim: int


class Rows(NamedTuple):
    """The address of the row for weight 0, and bytes to the next row."""

    address: int
    stride: int


class History(NamedTuple):
    """Rows before a step: address of the slot's first row, bytes to the next, the number of the row for weight 0; rows
    of the ring, or 0."""

    address: int
    stride: int
    first: int
    ring: int


@inlined
def share_of(batch, channels, head_dim, thread, num_threads):
    """The thread's Share: requests with all channels, whole rows of memory, where they are many and have a token each;
    else runs of channels, whole heads, through all requests."""
    if batch.num_tokens == batch.num_requests and batch.num_requests >= REQUESTS_OF_THREAD * num_threads:
        return Share(channels, 0, channels, thread, num_threads)
    width = min(max(channels // num_threads, LEAST_CHANNELS), MOST_CHANNELS)
    width = max(width // head_dim, 1) * head_dim
    return Share(width, thread * width, num_threads * width, 0, 1)


@inlined
def convolution(a, ring):
    """The Convolution of an op."""
    x, row = a.x + 4 * a.offset, 4 * a.channels
    return Convolution(x, a.weight, a.state, a.out, 4 * a.row_width, row, a.conv_width, ring)


@inlined
def convolve(batch, c, share, channel, num_channels, heads):
    """The rows of the share's requests, num_channels channels from `channel` on. c: a Convolution. heads: a Heads."""
    x, weight, state, out, x_row, row, J, ring = c
    table, offset = stack_memory(TABLE), 4 * channel
    for s in range(share.first_request, batch.num_requests, share.next_request):
        first, skipped = entry(batch.query_start, s), 0
        start, end = entry(batch.position, first), entry(batch.query_start, s + 1)
        old = state + entry(batch.state_slot, s) * (ring if ring else J - 1) * row + offset
        for t in range(first, end):
            before, age = max(J - 1 - (t - first), 0), t - first
            # zeros before position 0 are left out: they would leave the sum at +0
            skipped = max(J - 1 - (start + age), 0) if ring else before if start == 0 else 0
            history = History(old, row, start + age - (J - 1) if ring else age, ring)
            new = Rows(x + (t - J + 1) * x_row + offset, x_row)
            find_rows(table, J, history, before, new, Rows(weight + offset, row))
            out_row = out + t * row + offset
            if J == 4 and before == 0:
                convolve_four(x + (t - 3) * x_row + offset, x_row, weight + offset, row, num_channels, out_row)
            else:
                convolve_row(table + 16 * skipped, num_channels, out_row)
            normalise_heads(heads, num_channels, out_row)
        if ring:
            for t in range(max(first, end - ring), end):
                copy_row(x + t * x_row + offset, num_channels, old + (start + t - first) % ring * row)
        else:
            keep_rows(table, skipped, J, num_channels, old, row)


@inlined
def normalise_heads(heads, num_channels, x):
    """Normalises, in place, the heads of q and k among num_channels channels at x. heads: a Heads."""
    num_q, num_qk, K = heads
    root = ONE / sqrt(np.float32(K))
    for i in range(0, min(num_channels, num_qk), K):
        normalise_head(x + 4 * i, 4 * K, root if i < num_q else ONE, x + 4 * i)


@inlined
def find_rows(table, J, old, before, new, weight):
    """Writes pairs of addresses, of a row and of its weight, ended by 0. The first `before` rows are those of old,
    a History; new and weight are Rows."""
    for j in range(J):
        row = (old.first + j) % old.ring if old.ring else old.first + j
        poke(table + 16 * j, old.address + row * old.stride if j < before else new.address + j * new.stride)
        poke(table + 16 * j + 8, weight.address + j * weight.stride)
    poke(table + 16 * J, 0)


@inlined
def convolve_row(place, num_channels, out):
    """One row of num_channels channels from the pairs of addresses at place."""
    for i in range(0, 4 * num_channels, 64):
        acc, pair = lanes(ZERO), place
        while peek(pair, int64) != 0:
            acc = fma(load(peek(pair, int64) + i), load(peek(pair + 8, int64) + i), acc)
            pair += 16
        store(out + i, silu(acc))


@inlined
def convolve_four(x, x_row, weight, row, num_channels, out):
    """The usual case, four weights and all rows of this step: the same sums without a table."""
    for i in range(0, 4 * num_channels, 64):
        acc = fma(load(x + i), load(weight + i), lanes(ZERO))
        acc = fma(load(x + x_row + i), load(weight + row + i), acc)
        acc = fma(load(x + 2 * x_row + i), load(weight + 2 * row + i), acc)
        acc = fma(load(x + 3 * x_row + i), load(weight + 3 * row + i), acc)
        store(out + i, silu(acc))


@inlined
def copy_row(x, num_channels, out):
    """Copies num_channels channels of a row."""
    for i in range(0, 4 * num_channels, 64):
        store(out + i, load(x + i))


@inlined
def keep_rows(table, skipped, J, num_channels, state, row):
    """Writes the last token's rows but the oldest to the state; rows before position 0 as zeros."""
    for j in range(1, J):
        for i in range(0, 4 * num_channels, 64):
            kept = lanes(ZERO) if j < skipped else load(peek(table + 16 * j, int64) + i)
            store(state + (j - 1) * row + i, kept)


TAPS = Layout("conv1d taps", taps)
delta_inputs = variant(inputs, "delta_inputs", OP=DeltaInputs, RING_ROWS=no_ring)
delta_inputs_verify = variant(inputs, "delta_inputs_verify", OP=DeltaInputsVerify, RING_ROWS=ring_rows)
CPU = {
    "conv1d": Implementation(conv1d, TAPS),
    "delta_inputs": Implementation(delta_inputs, TAPS),
    "delta_inputs_verify": Implementation(delta_inputs_verify, TAPS),
}
