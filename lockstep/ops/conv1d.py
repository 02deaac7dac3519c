"""Causal depthwise convolution over time with silu, its history carried from step to step: the definition.

out[t, c] = silu(sum_j weight[c, j] * x[t - J + 1 + j, c])
"""

import numpy as np
from numba import carray

from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, kernel
from lockstep.runtime.machine import float_array, int_array
from lockstep.runtime.simd import fma
from lockstep.runtime.step import NUM_REQUESTS, NUM_TOKENS, POSITION, QUERY_START, STATE_SLOT, step_word, word

ZERO = np.float32(0)


@definition
def conv1d(x_TW, offset, weight_CJ, query_start_S1, position_T, slot_S, state_NJC, out_TC):
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
    for s in range(slot_S.shape[0]):
        first, end = query_start_S1[s], query_start_S1[s + 1]
        for c in range(C):
            for j in range(1, J):
                window[j] = ZERO if position_T[first] == 0 else state_NJC[slot_S[s], j - 1, c]
            for t in range(first, end):
                for j in range(1, J):
                    window[j - 1] = window[j]
                window[J - 1] = x_TW[t, offset + c]
                acc = ZERO
                for j in range(J):
                    acc = fma(window[j], weight_CJ[c, j], acc)
                out_TC[t, c] = silu(acc)
            for j in range(1, J):
                state_NJC[slot_S[s], j - 1, c] = window[j]


@inlined
def requests(step):
    """(query_start, position, state slot, number of slots to look at) of a step, as arrays."""
    T, S = step_word(step, NUM_TOKENS), step_word(step, NUM_REQUESTS)
    slot_S = carray(int_array(step_word(step, STATE_SLOT)), (S,))
    return (
        carray(int_array(step_word(step, QUERY_START)), (S + 1,)),
        carray(int_array(step_word(step, POSITION)), (T,)),
        slot_S,
        slot_S.max() + 1,
    )


@kernel
def _run(op, step, thread, num_threads):
    if thread == 0:
        T, W, C, J = step_word(step, NUM_TOKENS), word(op, 4), word(op, 6), word(op, 7)
        start_S1, position_T, slot_S, N = requests(step)
        conv1d(
            carray(float_array(word(op, 1)), (T, W)),
            word(op, 5),
            carray(float_array(word(op, 2)), (C, J)),
            start_S1,
            position_T,
            slot_S,
            carray(float_array(word(op, 3)), (N, J - 1, C)),
            carray(float_array(word(op, 0)), (T, C)),
        )


REFERENCE = {"conv1d": Implementation(_run)}
