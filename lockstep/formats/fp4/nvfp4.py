"""NVFP4: 64 weights in 36 bytes, w = e[i / 16] * F[q], where F has the 16 floats with two bits of exponent and one of
fraction: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives.

    byte 0..3   e, a scale of 8 bits (E4M3) for each 16 weights
    byte 4..35  q: 8 bytes for each 16 weights, low nibbles the first 8, high nibbles the last 8

Files have a factor for each tensor beside it: such a tensor is read as NVFP4_SCALED.
Source: block_nvfp4 in ggml-common.h and dequantize_row_nvfp4 in ggml-quants.c.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Stored
from lockstep.formats.fp4.nvfp4_scaled import stored_rows
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.e4m3 import E4M3, checked_halves, half_e4m3, halves, peek_half_e4m3
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.sixteen_floats import (
    PACKED,
    PAIRS,
    PARTS,
    PRODUCT,
    SIZE,
    codes_of,
    decoded,
    entry_of,
    store_entries,
    tile,
)
from lockstep.formats.parts.tables import TWICE_E2M1
from lockstep.native.kernel import definition, inlined

BLOCK = np.dtype([("d", E4M3, PARTS), ("codes", PAIRS)])
BYTES, (D, CODES) = BLOCK.itemsize, offsets(BLOCK)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 0..15 [..., K] and half of the scales float32 [..., K / 16], infinite where there is no scale."""
    return blk.joined(codes_of(blocks["codes"])), blk.joined(checked_halves(blocks["d"]))


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 64]. Error: none, each product is exact in float32."""
    return decoded(blocks["codes"], halves(blocks["d"]))


def times(rows: np.ndarray, factor: np.float32) -> np.ndarray:
    """Rows of NVFP4_SCALED, of rows uint8 [..., bytes] and a factor of all their weights."""
    codes, d = unpack(blk.as_blocks(rows, BLOCK))
    return stored_rows(codes, d * factor)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block, j = BYTES * (i // SIZE), i % SIZE
    return half_e4m3(row_B, block + D + j // 16) * entry_of(row_B, block + CODES, j)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    for part in range(PARTS):
        store_entries(block + CODES + 8 * part, peek_half_e4m3(block + D + part), scale, out + 64 * part)


NVFP4 = Format(
    "nvfp4",
    gguf_type=40,
    stored=Stored(BLOCK, SIZE, unpack, decode),
    packed=PACKED,
    product=PRODUCT,
    tile=tile,
    unpacked=8,
    lookup=Lookup(weight, store_block, SIZE),
    fallback="f32",
    table=TWICE_E2M1,
    one_row_ahead=2048,
    made_up_scale=2.0**-8,
    times=("nvfp4_scaled", times),
)
