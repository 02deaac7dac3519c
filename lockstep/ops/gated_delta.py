"""The gated delta rule, a linear attention with a matrix as its memory, and what prepares its inputs: the definitions.

    S <- decay * S;   delta = beta * (v - S^T k);   S <- S + k (x) delta;   o = S^T q

The recurrence, one token after another, is the definition in prefill too. The chunked (WY) form reassociates sums, so
it could never give the same bits as decode.
"""

import numpy as np
from numba import carray

from lockstep.ops.conv1d import conv1d, requests
from lockstep.ops.math import EXP_HIGHEST, exp, sigmoid
from lockstep.ops.reduce import tree_sum
from lockstep.ops.softplus import softplus
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.simd import fma, minimum, sqrt
from lockstep.runtime.step import num_rows, word

ONE, ZERO, L2_EPS = np.float32(1), np.float32(0), np.float32(1e-6)
BLOCK = 16  # value columns whose state lies together


@definition
def l2_norm(x_TW, num_k_heads, K, out_TX):
    """Makes every head of q and of k a unit vector, and divides q by sqrt(K).

    Shapes: x [T, W] float32, of which the first 2 * num_k_heads * K columns are read, the heads of q and then those of
      k; out [T, X], the same columns; it may be x. K a multiple of 16.
    Error: below 4 ulp of the float64 result.
    Order: squares are summed in 16 lanes, lane i taking elements i, i + 16, ... by FMA; the lanes by `tree_sum`; then
      scale = 1 / sqrt(sum + 1e-6); k = x * scale; q = (x * scale) * (1 / sqrt(K)).
    Source: l2norm in transformers' Qwen3-Next; the epsilon is added to the sum, not to a mean.
    """
    lane = np.empty(16, np.float32)
    for t in range(x_TW.shape[0]):
        for h in range(2 * num_k_heads):
            lane[:] = ZERO
            for i in range(K):
                lane[i % 16] = fma(x_TW[t, h * K + i], x_TW[t, h * K + i], lane[i % 16])
            scale = ONE / sqrt(tree_sum(lane) + L2_EPS)
            factor = ONE / sqrt(np.float32(K)) if h < num_k_heads else ONE
            for i in range(K):
                out_TX[t, h * K + i] = (x_TW[t, h * K + i] * scale) * factor


@inlined
def decay_gate(a, dt_bias, a_log):
    """How much of the memory a token keeps: exp(-exp(A_log) * softplus(a + dt_bias)), in that order."""
    return exp(-(exp(minimum(a_log, EXP_HIGHEST)) * softplus(a + dt_bias)))


@definition
def delta_gates(x_TW, a_offset, b_offset, a_log_H, dt_bias_H, out_T2H):
    """For every token and value head, decay (first H columns) and beta = sigmoid(b) (last H).

    Shapes: x [T, W] float32, of which columns a_offset .. + H and b_offset .. + H are read; A_log, dt_bias [H];
      out [T, 2 H], decay in [0, 1] and beta in [0, 1].
    Error: beta below 3 ulp; decay below 2e-7 + 4e-7 * |log(decay)| of itself.
    Order: see `decay_gate`.
    Source: Yang et al. 2024; transformers' Qwen3-Next.
    """
    H = a_log_H.shape[0]
    for t in range(x_TW.shape[0]):
        for h in range(H):
            out_T2H[t, h] = decay_gate(x_TW[t, a_offset + h], dt_bias_H[h], a_log_H[h])
            out_T2H[t, H + h] = sigmoid(x_TW[t, b_offset + h])


@definition
def gated_delta(
    qk_TW, v_TX, v_offset, gates_T2H, num_k_heads, query_start_S1, position_T, slot_S, state_NHBKC, out_THV
):
    """Runs every request's tokens through its memory in order of time.

    Shapes: qk [T, W] float32, heads of q and then of k (`l2_norm`), K wide; v [T, X], of which columns v_offset ..
      + H * V are read; gates [T, 2 H] (`delta_gates`); state [slots, H, V / 16, K, 16]: S[i, j] of head h is
      state[slot, h, j // 16, i, j % 16]; out [T, H, V]. Value head h uses head h // (H / num_k_heads) of q and k.
      K and V are multiples of 16.
    Units: a request that starts at position 0 starts with S = 0 and never reads its slot. The slot is written when the
      request's tokens of this step are done.
    Error: that of float32 sums over K; relative to float64 about 1e-6 of the largest output, over 1000 tokens too.
    Order: for each value column: S = S * decay; p = fma(S, k, p) over i ascending from +0; delta = (v - p) * beta;
      S = fma(k, delta, S); o = fma(S, q, o) over i ascending from +0.
    Source: Yang et al. 2024, "Gated Delta Networks"; torch_recurrent_gated_delta_rule in transformers.
    """
    H, K, V = out_THV.shape[1], state_NHBKC.shape[3], out_THV.shape[2]
    for s in range(slot_S.shape[0]):
        first, end = query_start_S1[s], query_start_S1[s + 1]
        for h in range(H):
            q, decay, beta = h // (H // num_k_heads) * K, h, H + h
            k = q + num_k_heads * K
            for j in range(V):
                S_K = state_NHBKC[slot_S[s], h, j // BLOCK, :, j % BLOCK]
                if position_T[first] == 0:
                    S_K[:] = ZERO
                for t in range(first, end):
                    p = o = ZERO
                    for i in range(K):
                        S_K[i] = S_K[i] * gates_T2H[t, decay]
                        p = fma(S_K[i], qk_TW[t, k + i], p)
                    delta = (v_TX[t, v_offset + h * V + j] - p) * gates_T2H[t, beta]
                    for i in range(K):
                        S_K[i] = fma(qk_TW[t, k + i], delta, S_K[i])
                        o = fma(S_K[i], qk_TW[t, q + i], o)
                    out_THV[t, h, j] = o


@kernel
def _l2_norm(op, step, thread, num_threads):
    if thread == 0:
        T, W, G, K = num_rows(op, step), word(op, 2), word(op, 3), word(op, 4)
        l2_norm(carray(float_array(word(op, 1)), (T, W)), G, K, carray(float_array(word(op, 0)), (T, 2 * G * K)))


@kernel
def _delta_gates(op, step, thread, num_threads):
    if thread == 0:
        T, W, H = num_rows(op, step), word(op, 4), word(op, 7)
        delta_gates(
            carray(float_array(word(op, 1)), (T, W)),
            word(op, 5),
            word(op, 6),
            carray(float_array(word(op, 2)), (H,)),
            carray(float_array(word(op, 3)), (H,)),
            carray(float_array(word(op, 0)), (T, 2 * H)),
        )


@kernel
def _gated_delta(op, step, thread, num_threads):
    if thread == 0:
        T, W, X, G, H, K, V = (
            num_rows(op, step),
            word(op, 5),
            word(op, 6),
            word(op, 8),
            word(op, 9),
            word(op, 10),
            word(op, 11),
        )
        start_S1, position_T, slot_S, N = requests(step)
        gated_delta(
            carray(float_array(word(op, 1)), (T, W)),
            carray(float_array(word(op, 2)), (T, X)),
            word(op, 7),
            carray(float_array(word(op, 3)), (T, 2 * H)),
            G,
            start_S1,
            position_T,
            slot_S,
            carray(float_array(word(op, 4)), (N, H, V // BLOCK, K, BLOCK)),
            carray(float_array(word(op, 0)), (T, H, V)),
        )


@kernel
def _delta_inputs(op, step, thread, num_threads):
    """conv1d, l2_norm (in place) and delta_gates, one after another."""
    if thread == 0:
        T, W, C, J, G, K, H = (
            num_rows(op, step),
            word(op, 7),
            word(op, 9),
            word(op, 10),
            word(op, 11),
            word(op, 12),
            word(op, 15),
        )
        start_S1, position_T, slot_S, N = requests(step)
        x_TW, u_TC = carray(float_array(word(op, 2)), (T, W)), carray(float_array(word(op, 0)), (T, C))
        conv1d(
            x_TW,
            word(op, 8),
            carray(float_array(word(op, 3)), (C, J)),
            start_S1,
            position_T,
            slot_S,
            carray(float_array(word(op, 6)), (N, J - 1, C)),
            u_TC,
        )
        l2_norm(u_TC, G, K, u_TC)
        delta_gates(
            x_TW,
            word(op, 13),
            word(op, 14),
            carray(float_array(word(op, 4)), (H,)),
            carray(float_array(word(op, 5)), (H,)),
            carray(float_array(word(op, 1)), (T, 2 * H)),
        )


REFERENCE = {
    "l2_norm": Implementation(_l2_norm),
    "delta_gates": Implementation(_delta_gates),
    "gated_delta": Implementation(_gated_delta),
    "delta_inputs": Implementation(_delta_inputs),
}
