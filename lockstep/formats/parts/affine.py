"""Weights d * q + m, with d and m for 32 of them: what Q4_1 and Q5_1 share."""

import numpy as np

from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.panels import Placed, k_major
from lockstep.native.kernel import inlined
from lockstep.native.simd import peek_f16, store, to_f32


def decoded(codes: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """d * q + m of blocks, float32 [num, 32], for their codes. Error: one rounding, of the addition."""
    return blk.scaled(codes, blocks["d"]) + blocks["m"].astype(np.float32)[:, None]


def placed(d: np.ndarray, m: np.ndarray) -> Placed:
    """d and m in a panel."""
    return {"d": (k_major, d), "m": (k_major, m)}


@inlined
def store_affine(codes, at_d, at_m, scale, out):
    """d * code + m for the first and the last 16 codes of a block, whose d and m lie at addresses."""
    d, m = peek_f16(at_d), peek_f16(at_m)
    store(out, (to_f32(codes[0]) * d + m) * scale)
    store(out + 64, (to_f32(codes[1]) * d + m) * scale)
