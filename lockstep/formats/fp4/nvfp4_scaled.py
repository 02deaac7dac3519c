"""NVFP4_SCALED: 64 weights in 48 bytes, w = d[i / 16] * 2 F[q], where F has the 16 floats of 4 bits (see nvfp4.py).

    byte 0..15   d, float32, for each 16 weights
    byte 16..47  q, as in NVFP4

No file stores it: weights are read as it that have a factor for a whole tensor beside their scales of 8 bits, whose
product, rounded once, is 2 d.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.scalars import single
from lockstep.formats.parts.sixteen_floats import (
    PACKED,
    PAIRS,
    PARTS,
    PRODUCT,
    SIZE,
    codes_of,
    decoded,
    entry_of,
    pairs_of,
    store_entries,
    tile,
)
from lockstep.formats.parts.tables import TWICE_E2M1
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import float32
from lockstep.native.simd import peek

BLOCK = np.dtype([("d", "<f4", PARTS), ("codes", PAIRS)])
BYTES, (D, CODES) = BLOCK.itemsize, offsets(BLOCK)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 0..15 [..., K] and d float32 [..., K / 16]."""
    return blk.joined(codes_of(blocks["codes"])), blk.joined(blocks["d"])


def stored_rows(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Rows as stored, uint8 [rows, bytes], of codes uint8 [rows, K] and d float32 [rows, K / 16]."""
    blocks = np.empty((len(codes), codes.shape[1] // SIZE), BLOCK)
    blocks["codes"] = pairs_of(codes.reshape(*blocks.shape, SIZE))
    blocks["d"] = d.reshape(*blocks.shape, PARTS)
    return blocks.view(np.uint8)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block, j = BYTES * (i // SIZE), i % SIZE
    return single(row_B, block + D + 4 * (j // 16)) * entry_of(row_B, block + CODES, j)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    for part in range(PARTS):
        store_entries(block + CODES + 8 * part, peek(block + D + 4 * part, float32), scale, out + 64 * part)


NVFP4_SCALED = Format(
    "nvfp4_scaled",
    gguf_type=None,
    stored=Stored(BLOCK, SIZE, unpack, lambda blocks: decoded(blocks["codes"], blocks["d"])),
    packed=PACKED,
    product=PRODUCT,
    tile=tile,
    unpacked=8,
    lookup=Lookup(weight, store_block, SIZE),
    fallback="f32",
    table=TWICE_E2M1,
    made_up_scale=2.0**-8,
)
