"""Q4_1: 32 weights in 20 bytes, w = d * q + m.

    byte 0..1   d, float16
    byte 2..3   m, float16
    byte 4..19  nibbles as in Q4_0

Source: block_q4_1 in ggml-common.h.
"""

import numpy as np

from lockstep.formats import blocks as blk

BLOCK_SIZE = 32
BLOCK_BYTES = 20


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: codes uint8 0..15 [..., K], d and m float16 [..., K / 32]."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    return blk.joined(blk.nibbles(blocks[..., 4:])), blk.field_f16(blocks, 0), blk.field_f16(blocks, 2)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the addition."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: affine(*split(blocks)))


def affine(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """d * q + m for codes q [blocks, 32], d and m [blocks, 1]."""
    return blk.scaled(codes, scale) + minimum.astype(np.float32)
