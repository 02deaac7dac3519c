"""Causal convolution: the fast kernel, and with it everything else that prepares the gated delta rule's inputs.

Lanes are channels, so nothing is transposed: the weight is stored [J, C] and a row of 16 channels reads its J rows of x
where the projection wrote them. Bound by exp in silu while x is in cache, else by 8 bytes per channel and token.
A task is a run of channels through all requests: whoever reads a request's old state also writes the new one.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined, kernel, variant
from lockstep.native.machine import stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import fma, lanes, load, peek, poke, sqrt, store
from lockstep.ops.math import silu
from lockstep.ops.recurrent.conv1d import Conv1d
from lockstep.ops.recurrent.gated_delta import DeltaInputs
from lockstep.ops.recurrent.gated_delta_cpu import gate_row, normalise_head
from lockstep.ops.recurrent.gated_delta_verify import DeltaInputsVerify
from lockstep.runtime.backend import Implementation, Layout, raw_weight
from lockstep.runtime.step import StepBlock, entry

OP = HISTORY = None  # of a variant: the op, and how many rows of history a slot has
ONE, ZERO = np.float32(1), np.float32(0)
CHANNELS = 256  # of a task
TABLE = 144  # bytes of pairs of addresses, as many as the widest kernel has weights, and an end


def taps(weight):
    """The weight as [J, C]; a vector stays as it is."""
    return (np.ascontiguousarray(raw_weight(weight)[0].T),)


@kernel
def conv1d(op, step, thread, num_threads):
    """Tasks are dealt to threads in turn."""
    a, batch = Conv1d.read(op), StepBlock.read(step)
    c = convolution(a, 0)
    for channel in range(thread * CHANNELS, a.channels, num_threads * CHANNELS):
        convolve(batch, c, channel, min(CHANNELS, a.channels - channel), (0, 0, 16))


@inlined
def no_ring(a):
    return 0


@inlined
def ring(a):
    return a.num_rows


def inputs(op, step, thread, num_threads):
    """The same tasks, of whole heads, with q and k normalised while they are in L1; then the gates of some rows."""
    a, batch = OP.read(op), StepBlock.read(step)
    c, keys, K, H = convolution(a, HISTORY(a)), a.num_k_heads * a.k_head_dim, a.k_head_dim, a.num_v_heads
    width = max(CHANNELS // K, 1) * K
    for channel in range(thread * width, a.channels, num_threads * width):
        heads = (keys - channel, 2 * keys - channel, K)
        convolve(batch, c, channel, min(width, a.channels - channel), heads)
    for t in range(thread, batch.num_tokens, num_threads):
        x = a.x + 4 * a.row_width * t
        gate_row(x + 4 * a.a_offset, x + 4 * a.b_offset, a.a_log, a.dt_bias, H, a.gates + 8 * H * t)


class Convolution(NamedTuple):
    """Addresses of x, weight [J, C], state and out; bytes of a row of x and of the others; J; how many rows a ring of
    state has, 0 for the last J - 1 rows, oldest first."""

    x: int
    weight: int
    state: int
    out: int
    x_row: int
    row: int
    J: int
    ring: int


@inlined
def convolution(a, ring):
    """The Convolution of an op."""
    x, row = a.x + 4 * a.offset, 4 * a.channels
    return Convolution(x, a.weight, a.state, a.out, 4 * a.row_width, row, a.conv_width, ring)


@inlined
def convolve(batch, c, channel, num, heads):
    """All rows of num channels from `channel` on. c: a Convolution. heads: see `normalise_heads`."""
    x, weight, state, out, x_row, row, J, ring = c
    table, offset = stack_memory(TABLE), 4 * channel
    for s in range(batch.num_requests):
        first, skipped = entry(batch.query_start, s), 0
        start, end = entry(batch.position, first), entry(batch.query_start, s + 1)
        old = state + entry(batch.state_slot, s) * (ring if ring else J - 1) * row + offset
        for t in range(first, end):
            before, age = max(J - 1 - (t - first), 0), t - first
            # zeros before position 0 are left out: they would leave the sum at +0
            skipped = max(J - 1 - (start + age), 0) if ring else before if start == 0 else 0
            history = (old, row, start + age - (J - 1) if ring else age, ring)
            new = (x + (t - J + 1) * x_row + offset, x_row)
            find_rows(table, J, history, before, new, (weight + offset, row))
            if J == 4 and before == 0:
                convolve_four(x + (t - 3) * x_row + offset, x_row, weight + offset, row, num, out + t * row + offset)
            else:
                convolve_row(table + 16 * skipped, num, out + t * row + offset)
            normalise_heads(heads, num, out + t * row + offset)
        if ring:
            for t in range(max(first, end - ring), end):
                copy_row(x + t * x_row + offset, num, old + (start + t - first) % ring * row)
        else:
            keep_rows(table, skipped, J, num, old, row)


@inlined
def normalise_heads(heads, num, x):
    """Normalises in place those of num channels that are heads of q or k.

    heads: how many channels from here on are q, how many q or k (none or fewer, if negative), channels of a head.
    """
    queries, both, K = heads
    root = ONE / sqrt(np.float32(K))
    for i in range(0, min(num, both), K):
        normalise_head(x + 4 * i, 4 * K, root if i < queries else ONE, x + 4 * i)


@inlined
def find_rows(table, J, old, before, new, weight):
    """Writes pairs of addresses, of a row and of the weight that it meets, ended by 0; the first `before` rows are old.

    old: (address of a slot's first row, bytes to the next, the row for weight 0, rows of a ring or 0). new, weight:
    (address for weight 0, bytes to the next).
    """
    for j in range(J):
        at = (old[2] + j) % old[3] if old[3] else old[2] + j
        poke(table + 16 * j, old[0] + at * old[1] if j < before else new[0] + j * new[1])
        poke(table + 16 * j + 8, weight[0] + j * weight[1])
    poke(table + 16 * J, 0)


@inlined
def convolve_row(place, num, out):
    """One row of num channels from the pairs of addresses at place."""
    for i in range(0, 4 * num, 64):
        acc, pair = lanes(ZERO), place
        while peek(pair, int64) != 0:
            acc = fma(load(peek(pair, int64) + i), load(peek(pair + 8, int64) + i), acc)
            pair += 16
        store(out + i, silu(acc))


@inlined
def convolve_four(x, x_row, weight, row, num, out):
    """The usual case: four weights, all rows of this step. The same sums without the table."""
    for i in range(0, 4 * num, 64):
        acc = fma(load(x + i), load(weight + i), lanes(ZERO))
        acc = fma(load(x + x_row + i), load(weight + row + i), acc)
        acc = fma(load(x + 2 * x_row + i), load(weight + 2 * row + i), acc)
        acc = fma(load(x + 3 * x_row + i), load(weight + 3 * row + i), acc)
        store(out + i, silu(acc))


@inlined
def copy_row(x, num, out):
    """Copies num channels of a row."""
    for i in range(0, 4 * num, 64):
        store(out + i, load(x + i))


@inlined
def keep_rows(table, skipped, J, num, state, row):
    """Keeps all rows that the last token met but the oldest; those before position 0 as zeros."""
    for j in range(1, J):
        for i in range(0, 4 * num, 64):
            kept = lanes(ZERO) if j < skipped else load(peek(table + 16 * j, int64) + i)
            store(state + (j - 1) * row + i, kept)


TAPS = Layout("conv1d taps", taps)
delta_inputs = variant(inputs, "delta_inputs", OP=DeltaInputs, HISTORY=no_ring)
delta_inputs_verify = variant(inputs, "delta_inputs_verify", OP=DeltaInputsVerify, HISTORY=ring)
CPU = {
    "conv1d": Implementation(conv1d, TAPS),
    "delta_inputs": Implementation(delta_inputs, TAPS),
    "delta_inputs_verify": Implementation(delta_inputs_verify, TAPS),
}
