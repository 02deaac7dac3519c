"""Q4_1: 32 weights in 20 bytes, w = d * q + m.

    byte 0..1   d, float16
    byte 2..3   m, float16
    byte 4..19  nibbles as in Q4_0

Source: block_q4_1 in ggml-common.h.
"""

import numpy as np

from lockstep.weights import blocks as blk
from lockstep.weights.q4_0 import nibbles

BLOCK_SIZE = 32
BLOCK_BYTES = 20


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the addition."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, _decode)


def _decode(blocks: np.ndarray) -> np.ndarray:
    scale = blk.field_f16(blocks, 0).astype(np.float32)[:, None]
    minimum = blk.field_f16(blocks, 2).astype(np.float32)[:, None]
    return scale * nibbles(blocks[:, 4:]).astype(np.float32) + minimum
