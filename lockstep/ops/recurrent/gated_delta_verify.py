"""The gated delta rule over drafts, tokens that may have to be forgotten: the definition.

    1. absorb   S <- S * decay + k (x) delta, by the records of the last step's accepted drafts
    2. certain  the tokens that are known, as in `gated_delta`; S is written
    3. drafts   on a copy of S that is thrown away; each draft's record is what brings S past it: k, delta, decay

Nothing has to be undone: the record of a rejected draft is never absorbed. Absorbing does what `gated_delta.recur` does
to S, on the same numbers, so that S has the bits that it has without drafts.
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array, int_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma
from lockstep.ops.math import ZERO
from lockstep.ops.recurrent.conv1d import conv1d_ring, requests_of
from lockstep.ops.recurrent.gated_delta import BLOCK, DeltaInputs, GatedDelta, prepare, recur
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import cache
from lockstep.runtime.program import CacheArray
from lockstep.runtime.step import StepBlock, num_rows


class GatedDeltaVerify(GatedDelta):
    """`GatedDelta` in steps that may end in drafts.

    records: that of position p is row p % num_records: delta [H V], k [G K], decay [H]. For D drafts there are 2 D + 1
    rows, so that pending records and a step's own never share one.
    """

    rules = (*GatedDelta.rules, "k_head_dim <= 256")  # two blocks of the state lie on a kernel's stack
    records: CacheArray = cache(
        "num_records, num_v_heads * v_head_dim + num_k_heads * k_head_dim + num_v_heads", "records", "f32"
    )
    num_records: int


class DeltaInputsVerify(DeltaInputs):
    """`DeltaInputs` whose history is a ring of num_rows rows by position, so that drafts can be forgotten: num_rows is
    conv_width - 1 + D for D drafts."""

    rules = (*DeltaInputs.rules, "conv_width - 1 <= num_rows")
    state: CacheArray = cache("num_rows, channels", "ring", "f32")
    num_rows: int


class Drafts(NamedTuple):
    """int32 [S]: drafts among each request's last rows; accepted drafts of the last step, still to be absorbed."""

    num_drafts_S: np.ndarray
    num_pending_S: np.ndarray


@definition
def absorb(S_K, k_K, delta, decay):
    """Brings one value column of the memory past a token for which `recur` returned this delta."""
    for i in range(S_K.size):
        S_K[i] = fma(k_K[i], delta, S_K[i] * decay)


@definition
def absorb_all(state_HBKC, records_PR, position, num_pending, num_k_heads):
    """Brings a request's memory past all its pending records, the last of which is that of position - 1; in place.

    Shapes: state [H, V / 16, K, 16]; records [P, H V + G K + H]. Order: as `absorb`, column by column.
    """
    (H, B, K, C), (P, R) = state_HBKC.shape, records_PR.shape
    for h in range(H):
        kept = H * B * C + h // (H // num_k_heads) * K
        for b in range(B):
            for p in range(position - num_pending, position):
                record_R, first = records_PR[p % P], (h * B + b) * C
                for i in range(K):
                    for c in range(C):
                        s = state_HBKC[h, b, i, c] * record_R[R - H + h]
                        state_HBKC[h, b, i, c] = fma(record_R[kept + i], record_R[first + c], s)


@definition
def gated_delta_verify(inputs, num_k_heads, requests, drafts, state_NHBKC, records_NPR, out_THV):
    """Runs every request's tokens through its memory; the memory is kept as it is before the first draft.

    Shapes: inputs: (qk, v, v_offset, gates); these, state, out as in `gated_delta`; records [slots, P, H V + G K + H].
    Units: pending records are those of the positions before the step's first. A request has drafts only after a row
      that is certain, and no more than one such row if records are pending; P is more than these and its drafts.
    Error: none beyond that of `gated_delta`: the same bits.
    Order: that of `gated_delta`.
    Source: the state is committed at the next step's start, as in ReplaySSM (vLLM #47572), but not reassociated.
    """
    qk_TW, v_TX, v_offset, gates_T2H = inputs
    H, K, V, P = out_THV.shape[1], state_NHBKC.shape[3], out_THV.shape[2], records_NPR.shape[1]
    for s in range(requests.slot_S.shape[0]):
        first, end, slot = requests.query_start_S1[s], requests.query_start_S1[s + 1], requests.slot_S[s]
        certain, start = end - drafts.num_drafts_S[s], requests.position_T[first]
        for h in range(H):
            q = h // (H // num_k_heads) * K
            k, kept = q + num_k_heads * K, H * V + q
            for j in range(V):
                S_K = state_NHBKC[slot, h, j // BLOCK, :, j % BLOCK]
                if start == 0:
                    S_K[:] = ZERO
                for p in range(start - drafts.num_pending_S[s], start):
                    record_R = records_NPR[slot, p % P]
                    absorb(S_K, record_R[kept : kept + K], record_R[h * V + j], record_R[record_R.size - H + h])
                column_K = S_K
                for t in range(first, end):
                    if t == certain:
                        column_K = S_K.copy()
                    q_K, k_K, v = qk_TW[t, q : q + K], qk_TW[t, k : k + K], v_TX[t, v_offset + h * V + j]
                    out, delta = recur(column_K, q_K, k_K, v, gates_T2H[t, h], gates_T2H[t, H + h])
                    out_THV[t, h, j] = out
                    if t >= certain:
                        records_NPR[slot, (start + t - first) % P, h * V + j] = delta
        for t in range(certain, end):
            record_R = records_NPR[slot, (start + t - first) % P]
            record_R[H * V : record_R.size - H] = qk_TW[t, num_k_heads * K : 2 * num_k_heads * K]
            record_R[record_R.size - H :] = gates_T2H[t, :H]


@inlined
def drafts_of(step):
    """The Drafts of a step."""
    batch = StepBlock.read(step)
    S = batch.num_requests
    return Drafts(carray(int_array(batch.num_drafts), (S,)), carray(int_array(batch.num_pending), (S,)))


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, T, requests = GatedDeltaVerify.read(op), num_rows(op, step), requests_of(step)
        H, K, V, G = a.num_v_heads, a.k_head_dim, a.v_head_dim, a.num_k_heads
        slots, width = requests.slot_S.max() + 1, H * V + G * K + H
        qk_TW, v_TX = carray(float_array(a.qk), (T, a.qk_width)), carray(float_array(a.v), (T, a.v_width))
        gates_T2H, out_THV = carray(float_array(a.gates), (T, 2 * H)), carray(float_array(a.out), (T, H, V))
        state_NHBKC = carray(float_array(a.state), (slots, H, V // BLOCK, K, BLOCK))
        records_NPR = carray(float_array(a.records), (slots, a.num_records, width))
        inputs = qk_TW, v_TX, a.v_offset, gates_T2H
        gated_delta_verify(inputs, G, requests, drafts_of(step), state_NHBKC, records_NPR, out_THV)


@kernel
def _inputs(op, step, thread, num_threads):
    """conv1d_ring, l2_norm (in place) and delta_gates, one after another."""
    if thread == 0:
        a, T, requests = DeltaInputsVerify.read(op), num_rows(op, step), requests_of(step)
        C, J, slots = a.channels, a.conv_width, requests.slot_S.max() + 1
        x_TW, weight_CJ = carray(float_array(a.x), (T, a.row_width)), carray(float_array(a.weight), (C, J))
        ring_NPC = carray(float_array(a.state), (slots, a.num_rows, C))
        conv1d_ring(x_TW, a.offset, weight_CJ, requests, ring_NPC, carray(float_array(a.out), (T, C)))
        prepare(a, T)


REFERENCE = {"gated_delta_verify": Implementation(_run), "delta_inputs_verify": Implementation(_inputs)}
