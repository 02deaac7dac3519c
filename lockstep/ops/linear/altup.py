"""Four streams of hidden rows, of which each layer computes one and predicts the others (AltUp): the definitions.

x[t, i] * rms(like[t]) / rms(x[t])                                  a row with the size of another
P_j = X_j + sum over i of c[4 j + i] X_i,  c = coefs tanh(logits)   what a layer will do to stream j
C_j = P_j + (1 + c[j]) (y - P_0),          c = coefs tanh(logits)   corrected by what it did to the first, y
"""

import numpy as np

from lockstep.native.kernel import definition, inlined, kernel
from lockstep.native.machine import float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma, maximum, sqrt
from lockstep.ops.hyperbolic import tanh
from lockstep.ops.math import ONE, ZERO, tree_sum
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, constant, output, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows

STREAMS = 4


class MatchRms(Operands):
    """out = x * rms(like) / sqrt(max(mean square of x, floor)), row by row; all [rows, width]."""

    group = "elementwise"
    rules = ("width % 16 == 0", "floor > 0")
    out: Tensor = output("width")
    x: Tensor = rows("width")
    like: Tensor = rows("width")
    width: int
    floor: float

    def flops(self, context):
        return 5 * self.width


class AltupPredict(Operands):
    """out_j = x_j + sum over i of c[4 j + i] x_i, c = coefs tanh(the first 4 logits); x and out [rows, width]."""

    group = "elementwise"
    rules = ("width % 16 == 0", f"logits_width >= {STREAMS}")
    out0: Tensor = output("width")
    out1: Tensor = output("width")
    out2: Tensor = output("width")
    out3: Tensor = output("width")
    x0: Tensor = rows("width")
    x1: Tensor = rows("width")
    x2: Tensor = rows("width")
    x3: Tensor = rows("width")
    logits: Tensor = rows("logits_width")
    coefs: Weight = constant(f"{STREAMS * STREAMS}, {STREAMS}")
    width: int
    logits_width: int

    def flops(self, context):
        return 2 * STREAMS * STREAMS * self.width


class AltupCorrect(Operands):
    """out_j = p_j + (1 + c[j]) (y - p_0), c = coefs tanh(the first 4 logits), and first = out_0 * scale; p, y, out and
    first [rows, width]."""

    group = "elementwise"
    rules = ("width % 16 == 0", f"logits_width >= {STREAMS}")
    out0: Tensor = output("width")
    out1: Tensor = output("width")
    out2: Tensor = output("width")
    out3: Tensor = output("width")
    first: Tensor = output("width")
    p0: Tensor = rows("width")
    p1: Tensor = rows("width")
    p2: Tensor = rows("width")
    p3: Tensor = rows("width")
    y: Tensor = rows("width")
    logits: Tensor = rows("logits_width")
    coefs: Weight = constant(f"{STREAMS}, {STREAMS}")
    scale: Weight = constant("width")
    width: int
    logits_width: int

    def flops(self, context):
        return (2 * STREAMS + 2) * self.width


@definition
def match_rms(x_TD, like_TD, floor, out_TD):
    """Shapes: x, like, out [T, D] float32; D a multiple of 16.

    Error: below 6 ulp of the float64 result for D up to 8192.
    Order: both sums of squares as in `rms_norm`; scale = sqrt(sum of like / D) / sqrt(max(sum of x / D, floor));
      x * scale.
    Source: Gemma 3n, `Gemma3nTextModel.forward` in transformers.
    """
    T, D = x_TD.shape
    lane, other = np.empty(16, np.float32), np.empty(16, np.float32)
    for t in range(T):
        lane[:] = np.float32(0)
        other[:] = np.float32(0)
        for i in range(D):
            lane[i % 16] = fma(x_TD[t, i], x_TD[t, i], lane[i % 16])
            other[i % 16] = fma(like_TD[t, i], like_TD[t, i], other[i % 16])
        width = np.float32(D)
        scale = sqrt(tree_sum(other) / width) / sqrt(maximum(tree_sum(lane) / width, floor))
        for i in range(D):
            out_TD[t, i] = x_TD[t, i] * scale


@definition
def altup_predict(x_JTD, logits_TW, coefs_KJ, out_JTD):
    """Shapes: x, out [4, T, D] float32; logits [T, W] with W >= 4; coefs [16, 4].

    Error: four roundings of the sum of the magnitudes of its terms.
    Order: c[k] = fma(w[k, 3], m_3, fma(w[k, 2], m_2, fma(w[k, 1], m_1, fma(w[k, 0], m_0, 0)))), m = tanh of logits;
      out_j begins with x_j, and takes c[4 j + i] * x_i by FMA for i = 0 .. 3.
    Source: Baykal et al. 2023 (AltUp); `Gemma3nTextAltUp.predict` in transformers.
    """
    m, c = np.empty(4, np.float32), np.empty(16, np.float32)
    for t in range(x_JTD.shape[1]):
        for i in range(4):
            m[i] = tanh(logits_TW[t, i])
        for k in range(16):
            c[k] = ZERO
            for i in range(4):
                c[k] = fma(coefs_KJ[k, i], m[i], c[k])
        for d in range(x_JTD.shape[2]):
            for j in range(4):
                total = x_JTD[j, t, d]
                for i in range(4):
                    total = fma(x_JTD[i, t, d], c[4 * j + i], total)
                out_JTD[j, t, d] = total


@definition
def altup_correct(p_JTD, y_TD, logits_TW, coefs_JJ, scale_D, out_JTD, first_TD):
    """Shapes: p, out [4, T, D] float32; y, first [T, D]; logits [T, W] with W >= 4; coefs [4, 4]; scale [D].

    Error: three roundings of the sum of the magnitudes of its terms.
    Order: c[j] as in `altup_predict`, but it begins with 1; out_j = fma(y - p_0, c[j], p_j); first = out_0 * scale.
    Source: Baykal et al. 2023 (AltUp); `Gemma3nTextAltUp.correct` in transformers.
    """
    m, c = np.empty(4, np.float32), np.empty(4, np.float32)
    for t in range(y_TD.shape[0]):
        for i in range(4):
            m[i] = tanh(logits_TW[t, i])
        for j in range(4):
            c[j] = ONE
            for i in range(4):
                c[j] = fma(coefs_JJ[j, i], m[i], c[j])
        for d in range(y_TD.shape[1]):
            change = y_TD[t, d] - p_JTD[0, t, d]
            for j in range(4):
                out_JTD[j, t, d] = fma(change, c[j], p_JTD[j, t, d])
            first_TD[t, d] = out_JTD[0, t, d] * scale_D[d]


@inlined
def gathered(addresses, shape):
    """A copy of the streams at four addresses, each of the same shape: float32 [4, *shape]."""
    made = np.empty((STREAMS, *shape), np.float32)
    for i in range(STREAMS):
        made[i] = carray(float_array(addresses[i]), shape)
    return made


@inlined
def scatter(streams, addresses):
    """Writes each stream to its address."""
    for i in range(STREAMS):
        carray(float_array(addresses[i]), streams.shape[1:])[:] = streams[i]


@kernel
def _match(op, step, thread, num_threads):
    if thread == 0:
        a = MatchRms.read(op)
        shape = num_rows(op, step), a.width
        x_TD, like_TD = carray(float_array(a.x), shape), carray(float_array(a.like), shape)
        match_rms(x_TD, like_TD, a.floor, carray(float_array(a.out), shape))


@kernel
def _predict(op, step, thread, num_threads):
    if thread == 0:
        a, T = AltupPredict.read(op), num_rows(op, step)
        x_JTD = gathered((a.x0, a.x1, a.x2, a.x3), (T, a.width))
        out_JTD = np.empty_like(x_JTD)
        logits_TW, coefs_KJ = carray(float_array(a.logits), (T, a.logits_width)), carray(float_array(a.coefs), (16, 4))
        altup_predict(x_JTD, logits_TW, coefs_KJ, out_JTD)
        scatter(out_JTD, (a.out0, a.out1, a.out2, a.out3))


@kernel
def _correct(op, step, thread, num_threads):
    if thread == 0:
        a, T = AltupCorrect.read(op), num_rows(op, step)
        p_JTD = gathered((a.p0, a.p1, a.p2, a.p3), (T, a.width))
        out_JTD = np.empty_like(p_JTD)
        y_TD, first_TD = carray(float_array(a.y), (T, a.width)), carray(float_array(a.first), (T, a.width))
        logits_TW, coefs_JJ = carray(float_array(a.logits), (T, a.logits_width)), carray(float_array(a.coefs), (4, 4))
        scale_D = carray(float_array(a.scale), (a.width,))
        altup_correct(p_JTD, y_TD, logits_TW, coefs_JJ, scale_D, out_JTD, first_TD)
        scatter(out_JTD, (a.out0, a.out1, a.out2, a.out3))


REFERENCE = {
    "match_rms": Implementation(_match),
    "altup_predict": Implementation(_predict),
    "altup_correct": Implementation(_correct),
}
