"""Q4_0: 32 weights in 18 bytes, w = d * (q - 8).

    byte 0..1   d, float16
    byte 2..17  low nibble of byte 2 + i is q[i], high nibble is q[i + 16]

Source: block_q4_0 in ggml-common.h; encode is its reference quantizer's arithmetic.
"""

import numpy as np

from lockstep.formats.format import SCALES, Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import LOW_BITS, U4, with_zero_points
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import k_major, nibble_pairs
from lockstep.formats.parts.products import CODES as PRODUCT
from lockstep.formats.parts.scalars import half, low_bits
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import bit_and, load_u8, peek_f16, shift_right, store, to_f32

BLOCK = np.dtype([("d", "<f2"), ("codes", "u1", 16)])
BYTES, (D, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("codes", LOW_BITS)])
ZERO = 8
EIGHT = np.int32(ZERO)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 0..15 [..., K] and scales float16 [..., K / 32]."""
    return blk.joined(blk.nibbles(blocks["codes"])), blocks["d"]


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 32]. Error: none, each product is exact in float32."""
    return blk.scaled(blk.nibbles(blocks["codes"]), blocks["d"], ZERO)


def encode(weights: np.ndarray) -> np.ndarray:
    """Blocks of float32 [num, 32]: the weight of largest magnitude becomes code 0, so d has the opposite of its sign.

    Error: at most one code, |d|, plus the rounding of d to float16. Source: quantize_row_q4_0_ref.
    """
    # argmax takes the first of equal magnitudes, as the reference does.
    largest = np.abs(weights).argmax(axis=1)
    scale = weights[np.arange(len(weights)), largest] / np.float32(-ZERO)
    shifted = weights * blk.inverse_or_zero(scale)[:, None] + np.float32(ZERO + 0.5)
    codes = np.minimum(shifted.astype(np.uint8), 15)
    blocks = np.empty(len(weights), BLOCK)
    blocks["d"], blocks["codes"] = blk.scale_to_f16(scale), codes[:, :16] | codes[:, 16:] << 4
    return blocks


def tile(s):
    """acc = fma(float(dot), w_scale * a_scale, acc): bias is -128 * sum, so bias >> 4 is -8 * sum."""
    return with_zero_points(s, PANEL, U4, 4)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    return half(row_B, block + D) * np.float32(low_bits(row_B, block + CODES, i) - ZERO)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    d, codes = peek_f16(block + D), load_u8(block + CODES)
    store(out, to_f32(bit_and(codes, 15) - EIGHT) * d * scale)
    store(out + 64, to_f32(shift_right(codes, 4) - EIGHT) * d * scale)


Q4_0 = Format(
    "q4_0",
    gguf_type=2,
    stored=Stored(BLOCK, 32, unpack, decode, encode),
    packed=Packed(PANEL, 32, lambda codes, d: {"codes": (nibble_pairs, codes), "d": (k_major, d)}, SCALES),
    product=PRODUCT,
    tile=tile,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    zero=ZERO,
    one_row_ahead=2048,
    is_choice=True,
)
