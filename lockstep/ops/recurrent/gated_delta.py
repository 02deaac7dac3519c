"""The gated delta rule, a linear attention with a matrix as memory, and the ops that prepare its inputs: definitions.

    S <- decay * S;   delta = beta * (v - S^T k);   S <- S + k (x) delta;   o = S^T q

The recurrence, one token after another, is the definition in prefill too. The chunked (WY) form reassociates sums, so
it could never give the same bits as decode.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, minimum, sqrt
from lockstep.ops.math import EXP_HIGHEST, ONE, ZERO, exp, sigmoid, softplus, tree_sum
from lockstep.ops.recurrent.conv1d import convolve, requests_of
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, cache, constant, output, rows
from lockstep.runtime.program import CacheArray, Tensor, Weight
from lockstep.runtime.step import num_rows

L2_EPS = np.float32(1e-6)
BLOCK = 16  # value columns whose state lies together


class L2Norm(Operands):
    """Heads of q and of k, the first columns of x, as unit vectors; heads of q are divided by sqrt(k_head_dim)."""

    in_place = True
    rules = ("k_head_dim % 16 == 0", "2 * num_k_heads * k_head_dim <= row_width")
    out: Tensor = output("2 * num_k_heads * k_head_dim")
    x: Tensor = rows("row_width")
    row_width: int
    num_k_heads: int
    k_head_dim: int


class DeltaGates(Operands):
    """Decay and beta of every value head, from columns a_offset .. and b_offset .. of x."""

    rules = ("a_offset + num_v_heads <= row_width", "b_offset + num_v_heads <= row_width")
    out: Tensor = output("2 * num_v_heads")
    x: Tensor = rows("row_width")
    a_log: Weight = constant("num_v_heads")
    dt_bias: Weight = constant("num_v_heads")
    row_width: int
    a_offset: int
    b_offset: int
    num_v_heads: int


class DeltaInputs(Operands):
    """Conv1d, L2Norm of its first columns in place, and DeltaGates, all from one row x."""

    rules = (
        "channels % 16 == 0",
        "2 <= conv_width <= 8",
        "k_head_dim % 16 == 0",
        "offset + channels <= row_width",
        "2 * num_k_heads * k_head_dim <= channels",
        "a_offset + num_v_heads <= row_width",
        "b_offset + num_v_heads <= row_width",
    )
    out: Tensor = output("channels")
    gates: Tensor = output("2 * num_v_heads")
    x: Tensor = rows("row_width")
    weight: Weight = constant("channels, conv_width")
    a_log: Weight = constant("num_v_heads")
    dt_bias: Weight = constant("num_v_heads")
    state: CacheArray = cache("conv_width - 1, channels", "state", "f32")
    row_width: int
    offset: int
    channels: int
    conv_width: int
    num_k_heads: int
    k_head_dim: int
    a_offset: int
    b_offset: int
    num_v_heads: int

    def flops(self, context):
        return (2 * self.conv_width + 4) * self.channels


class GatedDelta(Operands):
    """S <- decay * S; delta = beta * (v - S^T k); S <- S + k (x) delta; out = S^T q, head by head."""

    rules = (
        "k_head_dim % 16 == 0",
        "v_head_dim % 16 == 0",
        "num_v_heads % num_k_heads == 0",
        "2 * num_k_heads * k_head_dim <= qk_width",
        "v_offset + num_v_heads * v_head_dim <= v_width",
    )
    out: Tensor = output("num_v_heads * v_head_dim")
    qk: Tensor = rows("qk_width")
    v: Tensor = rows("v_width")
    gates: Tensor = rows("2 * num_v_heads")
    state: CacheArray = cache("num_v_heads, v_head_dim // 16, k_head_dim, 16", "state", "f32")
    qk_width: int
    v_width: int
    v_offset: int
    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int

    def flops(self, context):
        return 7 * self.num_v_heads * self.k_head_dim * self.v_head_dim


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
def recur(S_K, q_K, k_K, v, decay, beta):
    """Runs one token through one value column of the memory. Returns (o, delta); see `gated_delta`."""
    p = o = ZERO
    for i in range(S_K.size):
        S_K[i] = S_K[i] * decay
        p = fma(S_K[i], k_K[i], p)
    delta = (v - p) * beta
    for i in range(S_K.size):
        S_K[i] = fma(k_K[i], delta, S_K[i])
        o = fma(S_K[i], q_K[i], o)
    return o, delta


@definition
def gated_delta(qk_TW, v_TX, v_offset, gates_T2H, num_k_heads, requests, state_NHBKC, out_THV):
    """Runs every request's tokens through its memory in order of time.

    Shapes: qk [T, W] float32, heads of q and then of k (`l2_norm`), K wide; v [T, X], of which columns v_offset ..
      + H * V are read; gates [T, 2 H] (`delta_gates`); state [slots, H, V / 16, K, 16]: S[i, j] of head h is
      state[slot, h, j // 16, i, j % 16]; out [T, H, V]. Value head h uses head h // (H / num_k_heads) of q and k.
      K and V are multiples of 16.
    Units: a request that starts at position 0 starts with S = 0 and never reads its slot. The slot is written when the
      request's tokens of this step are done.
    Error: that of float32 sums over K; relative to float64 about 1e-6 of the largest output, also after 1000 tokens.
    Order: for each value column: S = S * decay; p = fma(S, k, p) over i ascending from +0; delta = (v - p) * beta;
      S = fma(k, delta, S); o = fma(S, q, o) over i ascending from +0.
    Source: Yang et al. 2024, "Gated Delta Networks"; torch_recurrent_gated_delta_rule in transformers.
    """
    H, K, V = out_THV.shape[1], state_NHBKC.shape[3], out_THV.shape[2]
    for s in range(requests.slot_S.shape[0]):
        first, end = requests.query_start_S1[s], requests.query_start_S1[s + 1]
        for h in range(H):
            q, decay, beta = h // (H // num_k_heads) * K, h, H + h
            k = q + num_k_heads * K
            for j in range(V):
                S_K = state_NHBKC[requests.slot_S[s], h, j // BLOCK, :, j % BLOCK]
                if requests.position_T[first] == 0:
                    S_K[:] = ZERO
                for t in range(first, end):
                    q_K, k_K, v = qk_TW[t, q : q + K], qk_TW[t, k : k + K], v_TX[t, v_offset + h * V + j]
                    out_THV[t, h, j] = recur(S_K, q_K, k_K, v, gates_T2H[t, decay], gates_T2H[t, beta])[0]


@kernel
def _l2_norm(op, step, thread, num_threads):
    if thread == 0:
        a, T = L2Norm.read(op), num_rows(op, step)
        out_TX = carray(float_array(a.out), (T, 2 * a.num_k_heads * a.k_head_dim))
        l2_norm(carray(float_array(a.x), (T, a.row_width)), a.num_k_heads, a.k_head_dim, out_TX)


@inlined
def _gates(a, out, T):
    """Runs `delta_gates` on the operands of an op; writes [T, 2 H] at the address out."""
    x_TW, out_T2H = carray(float_array(a.x), (T, a.row_width)), carray(float_array(out), (T, 2 * a.num_v_heads))
    a_log_H = carray(float_array(a.a_log), (a.num_v_heads,))
    dt_bias_H = carray(float_array(a.dt_bias), (a.num_v_heads,))
    delta_gates(x_TW, a.a_offset, a.b_offset, a_log_H, dt_bias_H, out_T2H)


@kernel
def _delta_gates(op, step, thread, num_threads):
    if thread == 0:
        a = DeltaGates.read(op)
        _gates(a, a.out, num_rows(op, step))


@kernel
def _gated_delta(op, step, thread, num_threads):
    if thread == 0:
        a, T, requests = GatedDelta.read(op), num_rows(op, step), requests_of(step)
        H, K, V = a.num_v_heads, a.k_head_dim, a.v_head_dim
        qk_TW, v_TX = carray(float_array(a.qk), (T, a.qk_width)), carray(float_array(a.v), (T, a.v_width))
        gates_T2H, out_THV = carray(float_array(a.gates), (T, 2 * H)), carray(float_array(a.out), (T, H, V))
        state_NHBKC = carray(float_array(a.state), (requests.slot_S.max() + 1, H, V // BLOCK, K, BLOCK))
        gated_delta(qk_TW, v_TX, a.v_offset, gates_T2H, a.num_k_heads, requests, state_NHBKC, out_THV)


@inlined
def prepare(a, T):
    """The steps of DeltaInputs after its convolution: `l2_norm` in place, and `delta_gates`."""
    out_TC = carray(float_array(a.out), (T, a.channels))
    l2_norm(out_TC, a.num_k_heads, a.k_head_dim, out_TC)
    _gates(a, a.gates, T)


@kernel
def _delta_inputs(op, step, thread, num_threads):
    """conv1d, l2_norm (in place) and delta_gates, one after another."""
    if thread == 0:
        a, T = DeltaInputs.read(op), num_rows(op, step)
        convolve(a, requests_of(step), a.out, T)
        prepare(a, T)


REFERENCE = {
    "l2_norm": Implementation(_l2_norm),
    "delta_gates": Implementation(_delta_gates),
    "gated_delta": Implementation(_gated_delta),
    "delta_inputs": Implementation(_delta_inputs),
}
