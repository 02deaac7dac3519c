"""Q4_0: 32 weights in 18 bytes, w = d * (q - 8).

    byte 0..1   d, float16
    byte 2..17  low nibble of byte 2 + i is q[i], high nibble is q[i + 16]

Source: block_q4_0 in ggml-common.h; quantize is its reference quantizer's arithmetic.
"""

import numpy as np

from lockstep.formats import blocks as blk

BLOCK_SIZE = 32
BLOCK_BYTES = 18


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: codes uint8 0..15 [..., K] and scales float16 [..., K / 32]."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    return blk.joined(blk.nibbles(blocks[..., 2:])), blk.field_f16(blocks, 0)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: none, each product is exact in float32."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: blk.scaled(*split(blocks), zero=8))


def quantize(weights: np.ndarray) -> np.ndarray:
    """Finite weights [..., K] to packed rows uint8 [..., bytes].

    The weight of largest magnitude becomes code 0, so d has the opposite of its sign.
    Error: at most one code, |d|, plus the rounding of d to float16. Source: quantize_row_q4_0_ref.
    """
    return blk.quantize_in_chunks(weights, BLOCK_SIZE, BLOCK_BYTES, _encode)


def _encode(weights: np.ndarray) -> np.ndarray:
    # argmax takes the first of equal magnitudes, as the reference does.
    largest = np.abs(weights).argmax(axis=1)
    scale = weights[np.arange(len(weights)), largest] / np.float32(-8)
    shifted = weights * blk.inverse_or_zero(scale)[:, None] + np.float32(8.5)
    codes = np.minimum(shifted.astype(np.uint8), 15)
    blocks = np.empty((len(weights), BLOCK_BYTES), np.uint8)
    blocks[:, :2] = blk.scale_to_f16(scale)[:, None].view(np.uint8)
    blocks[:, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return blocks
