"""Q5_1: 32 weights in 24 bytes, w = d * q + m.

    byte 0..1   d, float16
    byte 2..3   m, float16
    byte 4..7   fifth bits as in Q5_0
    byte 8..23  low four bits as in Q4_0

Source: block_q5_1 in ggml-common.h.
"""

import numpy as np

from lockstep.weights import blocks as blk
from lockstep.weights.q4_1 import scaled
from lockstep.weights.q5_0 import five_bits

BLOCK_SIZE = 32
BLOCK_BYTES = 24


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the addition."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, _decode)


def _decode(blocks: np.ndarray) -> np.ndarray:
    return scaled(blocks, five_bits(blocks[:, 4:8], blocks[:, 8:]))
