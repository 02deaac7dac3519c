"""Q5_K: 256 weights in 176 bytes, Q4_K with a fifth bit: w = d * sc * q - dmin * m.

    byte 0..15    d, dmin, sc and m as in Q4_K
    byte 16..47   fifth bits: bit g of byte i belongs to weight i of the g-th group of 32
    byte 48..175  low four bits as in Q4_K

Source: block_q5_K in ggml-common.h and dequantize_row_q5_K in ggml-quants.c.
"""

import numpy as np

from lockstep.formats import blocks as blk
from lockstep.formats.q4_k import affine, fields

BLOCK_SIZE = 256
BLOCK_BYTES = 176


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: as `q4_k.split`, with codes 0..31."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    shape = blocks.shape[:-1]
    low = blk.nibbles(blocks[..., 48:].reshape(*shape, 4, 32)).reshape(*shape, 8, 32)
    groups = np.arange(8, dtype=np.uint8)[:, None]
    return fields(blocks, low | (blocks[..., None, 16:48] >> groups & 1) << 4)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the subtraction."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: affine(*split(blocks)))
