"""Root-mean-square norm of each head, times a weight, times silu of a gate: the definition.

out[t, h] = o[t, h] * rsqrt(mean(o[t, h]^2) + eps) * w * silu(z[t, h])
"""

import numpy as np
from numba import carray

from lockstep.ops.math import silu
from lockstep.ops.reduce import tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, kernel
from lockstep.runtime.machine import float_array
from lockstep.runtime.simd import fma, sqrt
from lockstep.runtime.step import num_rows, number, word

ONE, ZERO = np.float32(1), np.float32(0)


@definition
def gated_norm(o_THK, z_TW, offset, weight_K, eps, out_THK):
    """Normalises every head of o and gates it by the columns offset .. offset + H * K of z.

    Shapes: o, out [T, H, K] float32; z [T, W]; weight [K], used as stored; K a multiple of 16.
    Error: below 6 ulp of the float64 result.
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
                out_THK[t, h, i] = ((o_THK[t, h, i] * scale) * weight_K[i]) * gate


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        T, W, H, K = num_rows(op, step), word(op, 4), word(op, 6), word(op, 7)
        gated_norm(
            carray(float_array(word(op, 1)), (T, H, K)),
            carray(float_array(word(op, 2)), (T, W)),
            word(op, 5),
            carray(float_array(word(op, 3)), (K,)),
            number(op, 8),
            carray(float_array(word(op, 0)), (T, H, K)),
        )


REFERENCE = {"gated_norm": Implementation(_run)}
