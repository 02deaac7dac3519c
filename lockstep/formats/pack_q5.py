"""Q4_1, Q5_0 and Q5_1 in panels of sixteen output features: one stream of blocks of 32, each whole cache lines.

    q4_1   320 bytes   d f16[16] | m f16[16] | low nibbles [4][16][4] as in q4_0
    q5_0   320 bytes   fifth bits [16][4] | low nibbles; scales in a stream of their own, as q8_0's
    q5_1   384 bytes   d f16[16] | m f16[16] | fifth bits | low nibbles

Bit g of a feature's byte j of fifth bits belongs to the code of k = 4 g + j. 5, 5.5 and 6 bits a weight.
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
from lockstep.runtime.tiles_dots import Q4_1_BYTES, Q5_0_BYTES, Q5_1_BYTES

q4_1_fields = partial(block_fields, format="q4_1")
q5_0_fields = partial(block_fields, format="q5_0")
q5_1_fields = partial(block_fields, format="q5_1")


def _empty(weight: Weight, num_bytes: int) -> np.ndarray:
    return np.zeros((num_panels(weight.shape[0]), weight.shape[1] // 32, num_bytes), np.uint8)


def _five_bits(blocks: np.ndarray, start: int) -> list[Output]:
    """Outputs for fifth bits and low nibbles, `start` bytes into a block."""
    return [
        (block_field(blocks, start, 64), in_blocks(fifth_bits, 32)),
        (block_field(blocks, start + 64, 256), in_blocks(nibble_pairs, 32)),
    ]


def _scale_and_minimum(blocks: np.ndarray) -> list[Output]:
    return [(block_field(blocks, at, PANEL, np.float16), k_major) for at in (0, 32)]


def pack_q4_1(weight: Weight) -> tuple[np.ndarray, ...]:
    """Blocks uint8 [panels, K / 32, 320]."""
    blocks = _empty(weight, Q4_1_BYTES)
    outputs = [(block_field(blocks, 64, 256), in_blocks(nibble_pairs, 32)), *_scale_and_minimum(blocks)]
    scatter(weight, outputs, q4_1_fields)
    return (blocks,)


def pack_q5_0(weight: Weight) -> tuple[np.ndarray, ...]:
    """Blocks uint8 [panels, K / 32, 320] and scales float16 [panels, K / 32, 16]."""
    blocks = _empty(weight, Q5_0_BYTES)
    scales = np.zeros((*blocks.shape[:2], PANEL), np.float16)
    outputs = [*_five_bits(blocks, 0), (scales, k_major)]
    scatter(weight, outputs, lambda part, rows: low_and_high(q5_0_fields(part, rows)))
    return blocks, scales


def pack_q5_1(weight: Weight) -> tuple[np.ndarray, ...]:
    """Blocks uint8 [panels, K / 32, 384]."""
    blocks = _empty(weight, Q5_1_BYTES)
    outputs = [*_five_bits(blocks, 64), *_scale_and_minimum(blocks)]
    scatter(weight, outputs, lambda part, rows: low_and_high(q5_1_fields(part, rows)))
    return (blocks,)
