"""Q4_1: 32 weights in 20 bytes, w = d * q + m.

    byte 0..1   d, float16
    byte 2..3   m, float16
    byte 4..19  nibbles as in Q4_0

Source: block_q4_1 in ggml-common.h.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.affine import decoded, placed, store_affine
from lockstep.formats.parts.dots import LOW_BITS, U4, with_minima
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, nibble_pairs
from lockstep.formats.parts.products import CODES_AND_MINIMA
from lockstep.formats.parts.scalars import half, low_bits
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import bit_and, load_u8, shift_right

BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)])
BYTES, (D, M, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("d", "<f2", FEATURES), ("m", "<f2", FEATURES), ("codes", LOW_BITS)])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 0..15 [..., K], d and m float16 [..., K / 32]."""
    return blk.joined(blk.nibbles(blocks["codes"])), blocks["d"], blocks["m"]


def arrange(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> Placed:
    return {"codes": (nibble_pairs, codes), **placed(d, m)}


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    return half(row_B, block + D) * np.float32(low_bits(row_B, block + CODES, i)) + half(row_B, block + M)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    codes = load_u8(block + CODES)
    store_affine((bit_and(codes, 15), shift_right(codes, 4)), block + D, block + M, scale, out)


Q4_1 = Format(
    "q4_1",
    gguf_type=3,
    stored=Stored(BLOCK, 32, unpack, lambda blocks: decoded(blk.nibbles(blocks["codes"]), blocks)),
    packed=Packed(PANEL, 32, arrange),
    product=CODES_AND_MINIMA,
    tile=lambda s: with_minima(s, PANEL, U4),
    unpacked=10,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    one_row_ahead=2048,
    made_up_scale=2.0**-8,
)
