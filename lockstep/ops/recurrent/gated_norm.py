"""Root-mean-square norm of each head, times a weight, times silu of a gate: the definition.

out[t, place(h)] = o[t, h] * rsqrt(mean(o[t, h]^2) + eps) * w * silu(z[t, h])

place(h) is h, or where files keep the heads in turns: one of each group, then the second of each.
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, sqrt
from lockstep.ops.math import ONE, ZERO, silu, tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows


class GatedNorm(Operands):
    """out = o / rms(o) * weight * silu(gate), head by head; the gate is columns z_offset .. + H K of z. num_in_turn:
    groups whose heads take turns in out; 1: out has the heads in the order of o."""

    rules = (
        "head_dim % 16 == 0",
        "eps >= 0",
        "num_heads % num_in_turn == 0",
        "z_offset + num_heads * head_dim <= row_width",
    )
    out: Tensor = output("num_heads * head_dim")
    o: Tensor = rows("num_heads * head_dim")
    z: Tensor = rows("row_width")
    weight: Weight = constant("head_dim")
    row_width: int
    z_offset: int
    num_heads: int
    head_dim: int
    eps: float
    num_in_turn: int = 1

    def flops(self, context):
        return 9 * self.num_heads * self.head_dim


@inlined
def place_of(h, num_heads, num_in_turn):
    """Where head h lies in out."""
    per_group = num_heads // num_in_turn
    return h % per_group * num_in_turn + h // per_group


@definition
def gated_norm(o_THK, z_TW, offset, weight_K, eps, out_THK, num_in_turn=1):
    """Normalises every head of o and gates it by the columns offset .. offset + H * K of z.

    Shapes: o, out [T, H, K] float32; z [T, W]; weight [K], used as stored; K a multiple of 16.
    Error: below 6 ulp of the float64 result.
    Place: head h of o is head (h mod R) G + floor(h / R) of out, for G = num_in_turn groups of R = H / G heads.
    Order: squares are summed in 16 lanes, lane i taking elements i, i + 16, ... by FMA; the lanes by `tree_sum`; then
      scale = 1 / sqrt(sum / K + eps) in that order, out = ((o * scale) * w) * silu(z).
    Source: Qwen3NextRMSNormGated in transformers; the norm comes before the gate.
    """
    T, H, K = o_THK.shape
    lane = np.empty(16, np.float32)
    for t in range(T):
        for h in range(H):
            lane[:] = ZERO
            for i in range(K):
                lane[i % 16] = fma(o_THK[t, h, i], o_THK[t, h, i], lane[i % 16])
            scale = ONE / sqrt(tree_sum(lane) / np.float32(K) + eps)
            for i in range(K):
                gate = silu(z_TW[t, offset + h * K + i])
                out_THK[t, place_of(h, H, num_in_turn), i] = ((o_THK[t, h, i] * scale) * weight_K[i]) * gate


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        a, T = GatedNorm.read(op), num_rows(op, step)
        shape = T, a.num_heads, a.head_dim
        o_THK, z_TW = carray(float_array(a.o), shape), carray(float_array(a.z), (T, a.row_width))
        weight_K = carray(float_array(a.weight), (a.head_dim,))
        gated_norm(o_THK, z_TW, a.z_offset, weight_K, a.eps, carray(float_array(a.out), shape), a.num_in_turn)


REFERENCE = {"gated_norm": Implementation(_run)}
