"""Q5_K: 256 weights in 176 bytes, Q4_K with a fifth bit: w = d * sc * q - dmin * m.

    byte 0..15    d, dmin, sc and m as in Q4_K
    byte 16..47   fifth bits: bit g of byte i belongs to weight i of the g-th group of 32
    byte 48..175  low four bits as in Q4_K

Source: block_q5_K in ggml-common.h and dequantize_row_q5_K in ggml-quants.c.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import five_bits, k_scales
from lockstep.formats.parts.five_bits import FIVE_BITS
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import Placed
from lockstep.formats.parts.scalars import byte
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import bit_and, load_u8, shift_right

BLOCK = np.dtype([*k_scales.HEAD, ("fifth", "u1", 32), ("low", "u1", (4, 32))])
BYTES, FIFTH, LOW = BLOCK.itemsize, offset(BLOCK, "fifth"), offset(BLOCK, "low")
PANEL = np.dtype([*k_scales.PANEL_HEAD, ("codes", FIVE_BITS, 8)])
SIXTEEN = np.int32(16)


def codes_of(blocks: np.ndarray) -> np.ndarray:
    """Codes 0..31 of blocks [..., 256]."""
    low = k_scales.low_codes(blocks["low"]).reshape(*blocks.shape, 8, 32)
    groups = np.arange(8, dtype=np.uint8)[:, None]
    codes = low | (blocks["fifth"][..., None, :] >> groups & 1) << 4
    return codes.reshape(*blocks.shape, 256)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes uint8 0..31 [..., K], d, dmin, sc and m."""
    return k_scales.unpacked(codes_of(blocks), blocks)


def arrange(codes: np.ndarray, *scales: np.ndarray) -> Placed:
    return {**five_bits.placed(codes), **k_scales.placed(*scales)}


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block_B, j = row_B[BYTES * (i // 256) :], i % 256
    fifth = byte(block_B, FIFTH + j % 32) >> j // 32 & 1
    return k_scales.weight(block_B, j, k_scales.low_code(block_B, LOW, j) | fifth << 4)


@inlined
def store_block(block, scale, out):
    """As of Q4_K, with fifth bits: bit g of byte i belongs to weight i of the g-th group of 32."""
    for pair in range(4):
        for i in range(0, 32, 16):
            codes, fifth = load_u8(block + LOW + 32 * pair + i), shift_right(load_u8(block + FIFTH + i), 2 * pair)
            low = bit_and(codes, 15) + bit_and(fifth, 1) * SIXTEEN
            high = shift_right(codes, 4) + bit_and(shift_right(fifth, 1), 1) * SIXTEEN
            k_scales.store_pair(low, high, block, pair, scale, out + 256 * pair + 4 * i)


Q5_K = Format(
    "q5_k",
    gguf_type=13,
    stored=Stored(BLOCK, 256, unpack, lambda blocks: k_scales.decoded(codes_of(blocks), blocks)),
    packed=Packed(PANEL, 256, arrange),
    product=k_scales.PRODUCT,
    tile=lambda s: k_scales.tile(s, PANEL, five_bits.U5),
    unpacked=10,
    lookup=Lookup(weight, store_block, 256),
    fallback="bf16",
    made_up_scale=2.0**-15,
)
