"""Root-mean-square norm: the fast kernel. Two passes over a row that stays in L1; bound by the read of x."""

import numpy as np

from lockstep.native.kernel import inlined, variant
from lockstep.native.simd import fma, lanes, load, sqrt, store, sum_lanes
from lockstep.ops.elementwise.rms_norm import RmsNorm
from lockstep.ops.math import ONE, ZERO
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ONE_THREAD = None  # constant of a variant: whether one thread norms all rows


def norm_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = RmsNorm.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        norm_row(a.x + 4 * a.width * t, a.weight, a.width, a.eps, a.offset, a.out + 4 * a.width * t)


@inlined
def inverse_rms(x, D, eps):
    """1 / sqrt(mean square + eps) of D float32 at address x."""
    total = lanes(ZERO)
    for i in range(0, 4 * D, 64):
        v = load(x + i)
        total = fma(v, v, total)
    return ONE / sqrt(sum_lanes(total) / np.float32(D) + eps)


@inlined
def norm_row(x, weight, D, eps, offset, out):
    """One row of D float32 at address x, normalised into out."""
    scaled_row(x, inverse_rms(x, D, eps), weight, D, offset, out)


@inlined
def scaled_row(x, scale, weight, D, offset, out):
    """D float32 at address x, times scale, times the weight and its offset, into out."""
    for i in range(0, 4 * D, 64):
        store(out + i, (load(x + i) * scale) * (load(weight + i) + offset))


rms_norm = variant(norm_rows, "rms_norm", ONE_THREAD=False)
rms_norm_per_token = variant(norm_rows, "rms_norm_per_token", ONE_THREAD=True)

CPU = {"rms_norm": Implementation(rms_norm)}
PER_TOKEN = {"rms_norm": Implementation(rms_norm_per_token)}
