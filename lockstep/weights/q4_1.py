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


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: codes uint8 0..15 [..., K], d and m float16 [..., K / 32]."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    return blk.joined(nibbles(blocks[..., 4:])), blk.field_f16(blocks, 0), blk.field_f16(blocks, 2)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the addition."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, _decode)


def scaled(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """d * q + m of blocks that begin with d and m, for their codes q [blocks, 32]."""
    scale, minimum = (blk.field_f16(blocks, at).astype(np.float32)[:, None] for at in (0, 2))
    return scale * codes.astype(np.float32) + minimum


def _decode(blocks: np.ndarray) -> np.ndarray:
    return scaled(blocks, nibbles(blocks[:, 4:]))
