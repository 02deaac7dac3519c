"""Philox4x32-10, a generator without state: four random words are a function of a counter and a key.

Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import numpy as np

from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import bit_and, bit_xor, fma, high_product, lane_numbers, minimum, shift_right, to_f32
from lockstep.ops.math import log, log1p

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF
U64_LOW, U64_32 = np.uint64(LOW), np.uint64(32)
U64_MULTIPLIER_0, U64_MULTIPLIER_1 = np.uint64(MULTIPLIER_0), np.uint64(MULTIPLIER_1)
I32_MULTIPLIER_0, I32_MULTIPLIER_1 = np.int32(MULTIPLIER_0 - 2**32), np.int32(MULTIPLIER_1 - 2**32)
TO_UNIT, HALF_STEP, BELOW_ONE = np.float32(2.0**-31), np.float32(2.0**-32), np.float32(1 - 2.0**-24)


@definition
def philox(c0, c1, c2, c3, k0, k1):
    """Four random words of 32 bits for a counter of four words and a key of two; all non-negative int64."""
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    for _ in range(ROUNDS):
        a, b = U64_MULTIPLIER_0 * x0, U64_MULTIPLIER_1 * x2
        x0, x1 = b >> U64_32 ^ x1 ^ np.uint64(k0), b & U64_LOW
        x2, x3 = a >> U64_32 ^ x3 ^ np.uint64(k1), a & U64_LOW
        k0, k1 = k0 + KEY_STEP_0 & LOW, k1 + KEY_STEP_1 & LOW
    return np.int64(x0), np.int64(x1), np.int64(x2), np.int64(x3)


@definition
def noise(seed, position, token):
    """The Gumbel noise of a token at a position of a request.

    Units: seed and position any int64; token below 2**34.
    Order: sixteen counters serve 64 tokens: word w of counter 16 b + l belongs to token 64 b + 16 w + l. The counter is
      (16 b + l, position's low and high word, 0), the key the seed's low and high word.
    """
    words = philox(token // 64 * 16 + token % 16, position & LOW, position >> 32 & LOW, 0, seed & LOW, seed >> 32 & LOW)
    return gumbel(to_f32(words[token // 16 % 4] >> 1))


@inlined
def gumbel(n):
    """-log(-log(1 - u)) for n in 0..2**31 - 1 as float32, u = (n + 1/2) / 2**31 but never 1.

    Small u make the large values that decide, so u keeps its full relative precision there: up to 22.2, and no
    single value has a visible probability. Order: u by one FMA, then `log1p` and `log`.
    """
    u = minimum(fma(n, TO_UNIT, HALF_STEP), BELOW_ONE)
    return -log(-log1p(-u))


@inlined
def philox_lanes(first, position, seed):
    """The words of `philox` for the 64 tokens from first (a multiple of 64) on, as four i32x16 in token order."""
    none = bit_and(lane_numbers(), 0)
    x0, x1 = bit_xor(lane_numbers(), first // 4), bit_xor(none, position)
    x2, x3 = bit_xor(none, position >> 32), none
    k0, k1 = seed, seed >> 32
    for _ in range(ROUNDS):
        high_0, high_1 = high_product(x0, MULTIPLIER_0), high_product(x2, MULTIPLIER_1)
        x0, x1, x2, x3 = (
            bit_xor(bit_xor(high_1, x1), k0),
            x2 * I32_MULTIPLIER_1,
            bit_xor(bit_xor(high_0, x3), k1),
            x0 * I32_MULTIPLIER_0,
        )
        k0, k1 = k0 + KEY_STEP_0, k1 + KEY_STEP_1
    return x0, x1, x2, x3


@inlined
def noise_lanes(words):
    """Gumbel noise of sixteen words."""
    return gumbel(to_f32(shift_right(words, 1)))
