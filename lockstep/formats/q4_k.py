"""Q4_K: 256 weights in 144 bytes, w = d * sc * q - dmin * m, with sc and m per 32 weights.

    byte 0..15    d, dmin, sc and m (see parts/k_scales.py)
    byte 16..143  q: each 32 bytes hold 64 weights, low nibbles the first 32, high nibbles the next 32

Source: block_q4_K and get_scale_min_k4 in ggml-common.h and ggml-quants.c.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import k_scales
from lockstep.formats.parts.dots import LOW_BITS, U4
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import Placed, nibble_pairs
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import bit_and, load_u8, shift_right

BLOCK = np.dtype([*k_scales.HEAD, ("codes", "u1", (4, 32))])
BYTES, CODES = BLOCK.itemsize, offset(BLOCK, "codes")
PANEL = np.dtype([*k_scales.PANEL_HEAD, ("codes", LOW_BITS.base, (8, *LOW_BITS.shape))])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes uint8 0..15 [..., K], d, dmin, sc and m."""
    return k_scales.unpacked(k_scales.low_codes(blocks["codes"]), blocks)


def arrange(codes: np.ndarray, *scales: np.ndarray) -> Placed:
    return {"codes": (nibble_pairs, codes), **k_scales.placed(*scales)}


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block_B, j = row_B[BYTES * (i // 256) :], i % 256
    return k_scales.weight(block_B, j, k_scales.low_code(block_B, CODES, j))


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale: 64 weights share 32 bytes of codes, low nibbles first."""
    for pair in range(4):
        for i in range(0, 32, 16):
            codes, to = load_u8(block + CODES + 32 * pair + i), out + 256 * pair + 4 * i
            k_scales.store_pair(bit_and(codes, 15), shift_right(codes, 4), block, pair, scale, to)


Q4_K = Format(
    "q4_k",
    gguf_type=12,
    stored=Stored(BLOCK, 256, unpack, lambda b: k_scales.decoded(k_scales.low_codes(b["codes"]), b)),
    packed=Packed(PANEL, 256, arrange),
    product=k_scales.PRODUCT,
    tile=lambda s: k_scales.tile(s, PANEL, U4),
    unpacked=10,
    lookup=Lookup(weight, store_block, 256),
    fallback="bf16",
    made_up_scale=2.0**-14,
)
