"""Q8_0: 32 weights in 34 bytes, w = d * q.

    byte 0..1   d, float16
    byte 2..33  q[0..31], int8

Source: block_q8_0 in ggml-common.h; quantize is its reference quantizer's arithmetic.
"""

import numpy as np

from lockstep.formats import blocks as blk

BLOCK_SIZE = 32
BLOCK_BYTES = 34


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes]: codes int8 [..., K] and scales float16 [..., K / 32]."""
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return blk.joined(codes), blk.field_f16(blocks, 0)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: none, each product is exact in float32."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: blk.scaled(*split(blocks)))


def quantize(weights: np.ndarray) -> np.ndarray:
    """Finite weights [..., K] to packed rows uint8 [..., bytes].

    Error: at most half a code, d / 2, plus the rounding of d to float16. Source: quantize_row_q8_0_ref.
    """
    return blk.quantize_in_chunks(weights, BLOCK_SIZE, BLOCK_BYTES, _encode)


def _encode(weights: np.ndarray) -> np.ndarray:
    scale = np.abs(weights).max(axis=1) / np.float32(127)
    codes = blk.round_half_away(weights * blk.inverse_or_zero(scale)[:, None])
    blocks = np.empty((len(weights), BLOCK_BYTES), np.uint8)
    blocks[:, :2] = blk.scale_to_f16(scale)[:, None].view(np.uint8)
    blocks[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return blocks
