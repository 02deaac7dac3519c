"""Q5_1: 32 weights in 24 bytes, w = d * q + m.

    byte 0..1   d, float16
    byte 2..3   m, float16
    byte 4..7   fifth bits as in Q5_0
    byte 8..23  low four bits as in Q4_0

Source: block_q5_1 in ggml-common.h.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import affine, five_bits
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import with_minima
from lockstep.formats.parts.five_bits import FIVE_BITS
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed
from lockstep.formats.parts.products import CODES_AND_MINIMA
from lockstep.formats.parts.scalars import half
from lockstep.native.kernel import definition, inlined

BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("fifth", "u1", 4), ("low", "u1", 16)])
BYTES, (D, M, FIFTH, LOW) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("d", "<f2", FEATURES), ("m", "<f2", FEATURES), ("codes", FIVE_BITS)])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 0..31 [..., K], d and m float16 [..., K / 32]."""
    return blk.joined(five_bits.codes_of(blocks)), blocks["d"], blocks["m"]


def arrange(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> Placed:
    return {**five_bits.placed(codes), **affine.placed(d, m)}


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    code = five_bits.code(row_B, block + FIFTH, block + LOW, i)
    return half(row_B, block + D) * np.float32(code) + half(row_B, block + M)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    codes = five_bits.loaded_codes(block + FIFTH, block + LOW)
    affine.store_affine(codes, block + D, block + M, scale, out)


Q5_1 = Format(
    "q5_1",
    gguf_type=7,
    stored=Stored(BLOCK, 32, unpack, lambda blocks: affine.decoded(five_bits.codes_of(blocks), blocks)),
    packed=Packed(PANEL, 32, arrange),
    product=CODES_AND_MINIMA,
    tile=lambda s: with_minima(s, PANEL, five_bits.U5),
    unpacked=10,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    made_up_scale=2.0**-9,
)
