"""Elementary functions and constants that all attention kernels and definitions share.

Each function is one formula for scalars and for lanes.
"""

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.simd import absolute, fma, maximum, minimum, pow2, rint, where_below
from lockstep.ops.math import ONE, ZERO

BLOCK = 64  # keys that share one maximum: a page
SPAN = 1024  # keys whose partial result is merged with those before; BLOCK and SPAN are constants of the numerics
MAX_HEAD_DIM = 512  # head dimensions are multiples of 16
MAX_GROUP = 96  # query heads that share a kv head
SMALLEST_KEPT = np.float32(2.0**-125)
TWO, SIXTY_FOUR = np.float32(2), np.float32(64)
LOG2E, LOWEST = np.float32(1.4426950408889634), np.float32(-126)
C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in (
        0.693147202855083,
        0.24022647913626555,
        0.05550332471099871,
        0.009618437357817977,
        0.0013398874422366099,
        0.00015353361889547043,
    )
)


@inlined
def exp2(x):
    """2**x for x <= 127; exactly 0 below -126, so that no denormal is ever produced.

    Error: 1 ulp. Order: n = rint(x), r = x - n (exact), a degree-6 polynomial of least relative error by Horner's rule,
    times 2**n.
    """
    n = rint(maximum(x, LOWEST))
    r = x - n
    p = fma(fma(fma(fma(C6, r, C5), r, C4), r, C3), r, C2)
    return where_below(x, LOWEST, ZERO, fma(fma(p, r, C1), r, ONE) * pow2(n))


@inlined
def cleared(x):
    """x, or +0 if its magnitude is below 2**-125: the same result whether the CPU flushes denormals or keeps them."""
    return where_below(absolute(x), SMALLEST_KEPT, ZERO, x)


@inlined
def soft_capped(score, cap):
    """cap * tanh(score / (2 log2 e)), as cap * (1 - 2 / (1 + 2**score)) with the score limited to 64 from above."""
    return cap * (ONE - TWO / (ONE + exp2(minimum(score, SIXTY_FOUR))))


@inlined
def score_scales(sm_scale, soft_cap):
    """(scale, cap): the factor of q, which puts scores in units of log 2, and the cap in these units (0: none).

    soft_cap * tanh(s / soft_cap) = soft_cap * (1 - 2 / (1 + e**(2 s / soft_cap))).
    """
    if soft_cap > ZERO:
        return sm_scale * (TWO * LOG2E / soft_cap), soft_cap * LOG2E
    return sm_scale * LOG2E, ZERO


@inlined
def first_key(position, window):
    """The first key that a query at a position sees; window 0: all keys up to its own."""
    return max(0, position + 1 - window) if window > 0 else 0


@inlined
def kept_share(top, total, sink):
    """The share of a row's weights that is left when a sink, a score without a value, joins the row's softmax.

    Units: top and total as `attention.attend` returns them; sink: a score in units of e.
    Order: s = sink * log2 e; M the larger of s and top; kept = total * 2**(top - M); kept / (kept + 2**(s - M)).
    """
    score = sink * LOG2E
    higher = maximum(score, top)
    kept = total * exp2(top - higher)
    return kept / (kept + exp2(score - higher))
