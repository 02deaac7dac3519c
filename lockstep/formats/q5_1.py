"""Q5_1: 32 weights in 24 bytes, w = d * q + m.

    byte 0..1   d, float16
    byte 2..3   m, float16
    byte 4..7   fifth bits as in Q5_0
    byte 8..23  low four bits as in Q4_0

Source: block_q5_1 in ggml-common.h.
"""

import numpy as np

from lockstep.formats import blocks as blk
from lockstep.formats.q4_1 import affine
from lockstep.formats.q5_0 import five_bits

BLOCK_SIZE = 32
BLOCK_BYTES = 24


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: codes uint8 0..31 [..., K], d and m float16 [..., K / 32]."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    codes = five_bits(blocks[..., 4:8], blocks[..., 8:])
    return blk.joined(codes), blk.field_f16(blocks, 0), blk.field_f16(blocks, 2)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the addition."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: affine(*split(blocks)))
