"""Q5_0: 32 weights in 22 bytes, w = d * (q - 16).

    byte 0..1   d, float16
    byte 2..5   fifth bits, little-endian: bit i belongs to q[i]
    byte 6..21  low four bits as in Q4_0

Source: block_q5_0 in ggml-common.h.
"""

import numpy as np

from lockstep.formats import blocks as blk

BLOCK_SIZE = 32
BLOCK_BYTES = 22


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: codes q uint8 0..31 [..., K] and scales float16 [..., K / 32]."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    return blk.joined(five_bits(blocks[..., 2:6], blocks[..., 6:])), blk.field_f16(blocks, 0)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: none, each product is exact in float32."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: blk.scaled(*split(blocks), zero=16))


def five_bits(fifth: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Codes 0..31 of blocks, uint8 [..., 32], from their fifth bits [..., 4] and low bits [..., 16]."""
    return blk.nibbles(low) | np.unpackbits(fifth, axis=-1, bitorder="little") << 4
