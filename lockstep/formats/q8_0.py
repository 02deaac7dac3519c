"""Q8_0: 32 weights in 34 bytes, w = d * q.

    byte 0..1   d, float16
    byte 2..33  q[0..31], int8

Source: block_q8_0 in ggml-common.h; encode is its reference quantizer's arithmetic.
"""

import numpy as np

from lockstep.formats.format import SCALES, Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import GROUP_BYTES, byte_dots, scale_add, stored_bytes, w_scales
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, in_fours, k_major, target_bytes
from lockstep.formats.parts.products import CODES as PRODUCT
from lockstep.formats.parts.scalars import half
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import load_i8, peek_f16, store, to_f32

BLOCK = np.dtype([("d", "<f2"), ("codes", "i1", 32)])
BYTES, (D, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("codes", "u1", (8, FEATURES, 4))])  # plus 128 where the target's dot takes unsigned weights


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [..., K] and scales float16 [..., K / 32]."""
    return blk.joined(blocks["codes"]), blocks["d"]


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 32]. Error: none, each product is exact in float32."""
    return blk.scaled(blocks["codes"], blocks["d"])


def encode(weights: np.ndarray) -> np.ndarray:
    """Blocks of float32 [num, 32]. Error: at most half a code, d / 2, plus the rounding of d to float16.

    Source: quantize_row_q8_0_ref.
    """
    scale = np.abs(weights).max(axis=1) / np.float32(127)
    codes = blk.round_half_away(weights * blk.inverse_or_zero(scale)[:, None])
    blocks = np.empty(len(weights), BLOCK)
    blocks["d"], blocks["codes"] = blk.scale_to_f16(scale), codes.astype(np.int8)
    return blocks


def arrange(codes: np.ndarray, d: np.ndarray) -> Placed:
    return {"codes": (in_fours, target_bytes(codes)), "d": (k_major, d)}


def tile(s):
    """acc = fma(float(dot), w_scale * a_scale, acc)."""

    def block(i, acc):
        start = s.b.mul(i, s.int(PANEL.itemsize))
        dots = byte_dots(s, i, stored_bytes(s, i, lambda c, g: s.codes(c, start, GROUP_BYTES * g)))
        return scale_add(s, acc, dots, w_scales(s, i), i)

    return s.blocks(32, block, PANEL.itemsize, SCALES.itemsize)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    return half(row_B, block + D) * np.float32(row_B[block + CODES + i % 32])


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    d = peek_f16(block + D)
    for i in range(0, 32, 16):
        store(out + 4 * i, to_f32(load_i8(block + CODES + i)) * d * scale)


Q8_0 = Format(
    "q8_0",
    gguf_type=8,
    stored=Stored(BLOCK, 32, unpack, decode, encode),
    packed=Packed(PANEL, 32, arrange, SCALES),
    product=PRODUCT,
    tile=tile,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    one_row_ahead=3072,
    is_signed=True,
    is_choice=True,
)
