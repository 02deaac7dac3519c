"""Causal depthwise convolution over time with silu, its history carried from step to step: the definition.

out[t, c] = silu(sum_j weight[c, j] * x[t - J + 1 + j, c])
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma
from lockstep.ops.math import ZERO, silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, constant, output, rows
from lockstep.runtime.program import CacheArray, Tensor, Weight
from lockstep.runtime.step import StepBlock


class Conv1d(Operands):
    """out[t, c] = silu(sum_j weight[c, j] * x[t - J + 1 + j, offset + c]), J the conv_width."""

    rules = ("channels % 16 == 0", "2 <= conv_width <= 8", "offset + channels <= row_width")
    out: Tensor = output("channels")
    x: Tensor = rows("row_width")
    weight: Weight = constant("channels, conv_width")
    state: CacheArray = cache("conv_width - 1, channels", "state", "f32")
    row_width: int
    offset: int
    channels: int
    conv_width: int


class Requests(NamedTuple):
    """The requests of a step: where the rows of each begin, positions of all rows, and the slot of state of each."""

    query_start_S1: np.ndarray
    position_T: np.ndarray
    slot_S: np.ndarray


@definition
def conv1d(x_TW, offset, weight_CJ, requests, state_NJC, out_TC):
    """Weighs every channel's own last J values, the present one with weight J - 1, and takes silu.

    Shapes: x [T, W] float32, of which columns offset .. offset + C are read; weight [C, J]; out [T, C]; state [slots,
      J - 1, C], a request's last J - 1 rows of x, oldest first, as they were before the convolution. C is a multiple
      of 16, J from 2 to 8.
    Units: what lies before position 0 counts as zero; a request that starts there never reads its slot.
    Error: below 2e-6 of the sum of |weight * x|, plus 3 ulp of silu.
    Order: acc = fma(x, weight, acc) over j ascending from +0, then silu(acc).
    Source: the short convolution of Mamba and Gated DeltaNet (Yang et al. 2024).
    """
    C, J = weight_CJ.shape
    window = np.empty(J, np.float32)
    for s in range(requests.slot_S.shape[0]):
        first, end, slot = requests.query_start_S1[s], requests.query_start_S1[s + 1], requests.slot_S[s]
        for c in range(C):
            for j in range(1, J):
                window[j] = ZERO if requests.position_T[first] == 0 else state_NJC[slot, j - 1, c]
            for t in range(first, end):
                for j in range(1, J):
                    window[j - 1] = window[j]
                window[J - 1] = x_TW[t, offset + c]
                acc = ZERO
                for j in range(J):
                    acc = fma(window[j], weight_CJ[c, j], acc)
                out_TC[t, c] = silu(acc)
            for j in range(1, J):
                state_NJC[slot, j - 1, c] = window[j]


@definition
def conv1d_ring(x_TW, offset, weight_CJ, requests, ring_NPC, out_TC):
    """`conv1d`, whose history is a ring: row p % P of a request's slot is its row of x at position p.

    Shapes: as in `conv1d`, but ring [slots, P, C], P at least J - 1 + the number of drafts that may be rejected.
    Units: a step goes on from the rows before its first position, whatever drafts were computed past them; its own
      rows, at most the last P, are written when all of them are computed.
    """
    (C, J), P = weight_CJ.shape, ring_NPC.shape[1]
    window = np.empty(J, np.float32)
    for s in range(requests.slot_S.shape[0]):
        first, end, slot = requests.query_start_S1[s], requests.query_start_S1[s + 1], requests.slot_S[s]
        start = requests.position_T[first]
        for c in range(C):
            for t in range(first, end):
                for j in range(J):
                    row = t - (J - 1) + j
                    position = start + row - first
                    window[j] = ZERO if position < 0 else ring_NPC[slot, position % P, c]
                    if row >= first:
                        window[j] = x_TW[row, offset + c]
                acc = ZERO
                for j in range(J):
                    acc = fma(window[j], weight_CJ[c, j], acc)
                out_TC[t, c] = silu(acc)
            for t in range(max(first, end - P), end):
                ring_NPC[slot, (start + t - first) % P, c] = x_TW[t, offset + c]


@inlined
def requests_of(step):
    """The Requests of a step."""
    batch = StepBlock.read(step)
    return Requests(
        carray(int_array(batch.query_start), (batch.num_requests + 1,)),
        carray(int_array(batch.position), (batch.num_tokens,)),
        carray(int_array(batch.state_slot), (batch.num_requests,)),
    )


@inlined
def convolve(a, requests, out, T):
    """Runs the definition on the operands of an op; writes [T, channels] at the address out."""
    C, J = a.channels, a.conv_width
    x_TW, weight_CJ = carray(float_array(a.x), (T, a.row_width)), carray(float_array(a.weight), (C, J))
    state_NJC = carray(float_array(a.state), (requests.slot_S.max() + 1, J - 1, C))
    conv1d(x_TW, a.offset, weight_CJ, requests, state_NJC, carray(float_array(out), (T, C)))


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a = Conv1d.read(op)
        convolve(a, requests_of(step), a.out, StepBlock.read(step).num_tokens)


REFERENCE = {"conv1d": Implementation(_run)}
