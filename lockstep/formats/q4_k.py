"""Q4_K: 256 weights in 144 bytes, w = d * sc * q - dmin * m, with sc and m per 32 weights.

    byte 0..1     d, float16
    byte 2..3     dmin, float16
    byte 4..15    8 scales sc and 8 minima m of 6 bits (see scales_and_minima)
    byte 16..143  q: each 32 bytes hold 64 weights, low nibbles the first 32, high nibbles the next 32

Source: block_q4_K and get_scale_min_k4 in ggml-common.h and ggml-quants.c.
"""

import numpy as np

from lockstep.formats import blocks as blk

BLOCK_SIZE = 256
BLOCK_BYTES = 144


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fields of packed rows uint8 [..., bytes].

    Returns codes uint8 0..15 [..., K], d float16 [..., K / 256], dmin float16 [..., K / 256],
    sc uint8 0..63 [..., K / 32] and m uint8 0..63 [..., K / 32].
    """
    blocks = blk.as_blocks(packed, BLOCK_BYTES)
    return fields(blocks, blk.nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)))


def fields(blocks: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `split` returns, for blocks that start like Q4_K's and their codes [..., blocks, groups, codes of one]."""
    scales, minima = scales_and_minima(blocks[..., 4:16])
    d, dmin = blk.field_f16(blocks, 0), blk.field_f16(blocks, 2)
    return blk.joined(blk.joined(codes)), d, dmin, blk.joined(scales), blk.joined(minima)


def dequantize(packed: np.ndarray) -> np.ndarray:
    """Packed rows uint8 [..., bytes] to float32 [..., K]. Error: one rounding, of the subtraction."""
    return blk.dequantize_in_chunks(packed, BLOCK_SIZE, BLOCK_BYTES, lambda blocks: affine(*split(blocks)))


def scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack uint8 [..., 12] to scales and minima, uint8 0..63 [..., 8] each.

    Entries 0..3 are the low 6 bits of bytes 0..3 (scales) and 4..7 (minima). Entries 4..7 take their low
    4 bits from the nibbles of bytes 8..11 and their high 2 bits from the top of bytes 0..3 and 4..7.
    """
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return scales, minima


def affine(codes: np.ndarray, d: np.ndarray, dmin: np.ndarray, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """d * sc * q - dmin * m for the fields of rows of one block each."""
    scale, minimum = d.astype(np.float32) * scales, dmin.astype(np.float32) * minima
    grouped = codes.reshape(-1, 8, 32).astype(np.float32)
    return (scale[:, :, None] * grouped - minimum[:, :, None]).reshape(-1, BLOCK_SIZE)
