"""K-quants in panels of sixteen output features: one stream of blocks of 256, each a few whole cache lines.

    q4_k   2368 bytes   d f16[16] | dmin f16[16] | sc u8[8][16] | m u8[8][16] | codes [32][16][4], nibbles as in q4_0
    q5_k   2880 bytes   d, dmin, sc and m as in q4_k | 8 times: fifth bits and low nibbles as in q5_0 (pack_q5.py)
    q6_k   3392 bytes   d f32[16] | sc i8[16][16] | 8 times: low nibbles [4][16][4] as in q4_0, high bits [2][16][4]

The two high bits of q6_k's codes k, k + 4, k + 8, k + 12 share a byte, lowest first; they lie beside the low nibbles of
the same 32 k, so that one row reads one stream. 4.625, 5.625 and 6.625 bits a weight.
"""

from functools import partial

import numpy as np

from lockstep.formats.pack import block_fields, scatter
from lockstep.formats.panels import (
    PANEL,
    Output,
    block_field,
    fifth_bits,
    in_blocks,
    k_major,
    low_and_high,
    nibble_pairs,
    num_panels,
)
from lockstep.runtime.program import Weight
from lockstep.runtime.tiles_k import Q4_K_BYTES, Q5_K_BYTES, Q6_K_BYTES

q4_k_fields = partial(block_fields, format="q4_k")
q5_k_fields = partial(block_fields, format="q5_k")
q6_k_fields = partial(block_fields, format="q6_k")


def _high_bits(values: np.ndarray) -> np.ndarray:
    """Codes 0..3 [panels, 16, K] to bytes [panels, K / 16, 16, 4]."""
    four = values.reshape(values.shape[0], PANEL, -1, 4, 4).transpose(0, 2, 1, 3, 4)
    return four[..., 0, :] | four[..., 1, :] << 2 | four[..., 2, :] << 4 | four[..., 3, :] << 6


def pack_q4_k(weight: Weight) -> tuple[np.ndarray, ...]:
    """Blocks uint8 [panels, K / 256, 2368]."""
    blocks = np.zeros((num_panels(weight.shape[0]), weight.shape[1] // 256, Q4_K_BYTES), np.uint8)
    scatter(weight, [(block_field(blocks, 320, 2048), in_blocks(nibble_pairs, 256)), *_scales(blocks)], q4_k_fields)
    return (blocks,)


def pack_q5_k(weight: Weight) -> tuple[np.ndarray, ...]:
    """Blocks uint8 [panels, K / 256, 2880]."""
    blocks = np.zeros((num_panels(weight.shape[0]), weight.shape[1] // 256, Q5_K_BYTES), np.uint8)
    codes = block_field(blocks, 320, 2560).reshape(*blocks.shape[:2], 8, 320)
    outputs = [
        (codes[..., :64], in_blocks(fifth_bits, 256, 8)),
        (codes[..., 64:], in_blocks(nibble_pairs, 256, 8)),
        *_scales(blocks),
    ]
    scatter(weight, outputs, lambda part, rows: low_and_high(q5_k_fields(part, rows)))
    return (blocks,)


def _scales(blocks: np.ndarray) -> list[Output]:
    """Outputs for d, dmin, sc and m."""
    return [
        (block_field(blocks, 0, 16, np.float16), k_major),
        (block_field(blocks, 32, 16, np.float16), k_major),
        (block_field(blocks, 64, 128), in_blocks(k_major, 8)),
        (block_field(blocks, 192, 128), in_blocks(k_major, 8)),
    ]


def pack_q6_k(weight: Weight) -> tuple[np.ndarray, ...]:
    """Blocks uint8 [panels, K / 256, 3392]."""
    blocks = np.zeros((num_panels(weight.shape[0]), weight.shape[1] // 256, Q6_K_BYTES), np.uint8)
    codes = block_field(blocks, 320, 3072).reshape(*blocks.shape[:2], 8, 384)
    outputs = [
        (codes[..., :256], in_blocks(nibble_pairs, 256, 8)),
        (codes[..., 256:], in_blocks(_high_bits, 256, 8)),
        (block_field(blocks, 64, 256, np.int8), in_blocks(k_major, 16)),
        (block_field(blocks, 0, 16, np.float32), k_major),
    ]

    def convert(part, rows):
        codes, sc, d = q6_k_fields(part, rows)
        codes = (codes + np.int8(32)).view(np.uint8)
        return codes & 15, codes >> 4, sc, d.astype(np.float32)

    scatter(weight, outputs, convert)
    return (blocks,)
