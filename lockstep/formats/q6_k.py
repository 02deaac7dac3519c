"""Q6_K: 256 weights in 210 bytes, w = d * sc * (q - 32), with sc per 16 weights.

    byte 0..127    low four bits: each 64 bytes hold 128 weights, low nibbles the first 64, high the next 64
    byte 128..191  high two bits: each 32 bytes hold 128 weights, bits 2j and 2j + 1 the j-th 32 of them
    byte 192..207  sc, int8
    byte 208..209  d, float16

Source: block_q6_K in ggml-common.h and dequantize_row_q6_K in ggml-quants.c.
"""

import numpy as np

from lockstep.formats import blocks as blk

BLOCK_SIZE = 256
BLOCK_BYTES = 210


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes].

    Returns codes int8 -32..31 [..., K], scales int8 [..., K / 16] and d float16 [..., K / 256].
    """
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return blk.joined(_codes(blocks)), blk.joined(scales), blk.field_f16(blocks, 208)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: none, each product is exact in float32."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, _decode)


def _codes(blocks: np.ndarray) -> np.ndarray:
    rows = blocks.shape[:-1]
    low = blk.nibbles(blocks[..., 0:128].reshape(*rows, 2, 64)).reshape(*rows, 2, 4, 32)
    pairs = blocks[..., 128:192].reshape(*rows, 2, 1, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = low | (pairs >> shifts & 3) << 4
    return codes.reshape(*rows, BLOCK_SIZE).view(np.int8) - np.int8(32)


def _decode(blocks: np.ndarray) -> np.ndarray:
    codes, scales, d = split(blocks)
    scale = d.astype(np.float32) * scales
    grouped = codes.reshape(-1, 16, 16).astype(np.float32)
    return (scale[:, :, None] * grouped).reshape(-1, BLOCK_SIZE)
