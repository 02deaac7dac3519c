"""Four streams of hidden rows: the fast kernels. Bound by memory: four reads and four writes of a row, or more."""

import numpy as np

from lockstep.native.kernel import inlined, variant
from lockstep.native.numbers import float32
from lockstep.native.simd import fma, lanes, load, maximum, peek, sqrt, store, sum_lanes
from lockstep.ops.hyperbolic import tanh
from lockstep.ops.linear.altup import AltupCorrect, AltupPredict, MatchRms
from lockstep.ops.math import ONE, ZERO
from lockstep.ops.share import strided
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import num_rows

ONE_THREAD = None  # constant of a variant: whether one thread does all rows


@inlined
def mean_square(x, D):
    """The mean square of D float32 at address x."""
    total = lanes(ZERO)
    for i in range(0, 4 * D, 64):
        v = load(x + i)
        total = fma(v, v, total)
    return sum_lanes(total) / np.float32(D)


def match_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = MatchRms.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        x, like, out = a.x + 4 * a.width * t, a.like + 4 * a.width * t, a.out + 4 * a.width * t
        scale = sqrt(mean_square(like, a.width)) / sqrt(maximum(mean_square(x, a.width), a.floor))
        for i in range(0, 4 * a.width, 64):
            store(out + i, load(x + i) * scale)


@inlined
def modality(logits, i):
    """tanh of logit number i."""
    return tanh(peek(logits + 4 * i, float32))


@inlined
def coefficient(coefs, k, start, m):
    """start + coefs[k] . m. m: four numbers."""
    row = coefs + 16 * k
    total = fma(peek(row, float32), m[0], start)
    total = fma(peek(row + 4, float32), m[1], total)
    total = fma(peek(row + 8, float32), m[2], total)
    return fma(peek(row + 12, float32), m[3], total)


@inlined
def predicted(own, x, c):
    """own + c . x: four numbers, and vectors of four streams."""
    return fma(x[3], c[3], fma(x[2], c[2], fma(x[1], c[1], fma(x[0], c[0], own))))


@inlined
def coefficients(coefs, j, m):
    """The four coefficients of stream j."""
    return (
        coefficient(coefs, 4 * j, ZERO, m),
        coefficient(coefs, 4 * j + 1, ZERO, m),
        coefficient(coefs, 4 * j + 2, ZERO, m),
        coefficient(coefs, 4 * j + 3, ZERO, m),
    )


def predict_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = AltupPredict.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        logits, row = a.logits + 4 * a.logits_width * t, 4 * a.width * t
        m = modality(logits, 0), modality(logits, 1), modality(logits, 2), modality(logits, 3)
        c0, c1 = coefficients(a.coefs, 0, m), coefficients(a.coefs, 1, m)
        c2, c3 = coefficients(a.coefs, 2, m), coefficients(a.coefs, 3, m)
        for i in range(row, row + 4 * a.width, 64):
            x = load(a.x0 + i), load(a.x1 + i), load(a.x2 + i), load(a.x3 + i)
            store(a.out0 + i, predicted(x[0], x, c0))
            store(a.out1 + i, predicted(x[1], x, c1))
            store(a.out2 + i, predicted(x[2], x, c2))
            store(a.out3 + i, predicted(x[3], x, c3))


def correct_rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = AltupCorrect.read(op)
    for t in strided(num_rows(op, step), thread, num_threads, ONE_THREAD):
        logits, row = a.logits + 4 * a.logits_width * t, 4 * a.width * t
        m = modality(logits, 0), modality(logits, 1), modality(logits, 2), modality(logits, 3)
        c0, c1 = coefficient(a.coefs, 0, ONE, m), coefficient(a.coefs, 1, ONE, m)
        c2, c3 = coefficient(a.coefs, 2, ONE, m), coefficient(a.coefs, 3, ONE, m)
        for i in range(0, 4 * a.width, 64):
            p0 = load(a.p0 + row + i)
            change = load(a.y + row + i) - p0
            corrected = fma(change, c0, p0)
            store(a.out0 + row + i, corrected)
            store(a.out1 + row + i, fma(change, c1, load(a.p1 + row + i)))
            store(a.out2 + row + i, fma(change, c2, load(a.p2 + row + i)))
            store(a.out3 + row + i, fma(change, c3, load(a.p3 + row + i)))
            store(a.first + row + i, corrected * load(a.scale + i))


CPU, PER_TOKEN = {}, {}
for _name, _body in (("match_rms", match_rows), ("altup_predict", predict_rows), ("altup_correct", correct_rows)):
    for _table, _one_thread, _suffix in ((CPU, False, ""), (PER_TOKEN, True, "_per_token")):
        globals()[_name + _suffix] = variant(_body, _name + _suffix, ONE_THREAD=_one_thread)
        _table[_name] = Implementation(globals()[_name + _suffix])
