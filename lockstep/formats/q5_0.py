"""Q5_0: 32 weights in 22 bytes, w = d * (q - 16).

    byte 0..1   d, float16
    byte 2..5   fifth bits, little-endian: bit i belongs to q[i]
    byte 6..21  low four bits as in Q4_0

Source: block_q5_0 in ggml-common.h.
"""

import numpy as np

from lockstep.formats.format import SCALES, Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import with_zero_points
from lockstep.formats.parts.five_bits import FIVE_BITS, U5, code, codes_of, loaded_codes, placed
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import k_major
from lockstep.formats.parts.products import CODES
from lockstep.formats.parts.scalars import half
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import peek_f16, store, to_f32

BLOCK = np.dtype([("d", "<f2"), ("fifth", "u1", 4), ("low", "u1", 16)])
BYTES, (D, FIFTH, LOW) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("codes", FIVE_BITS)])
ZERO = 16
SIXTEEN = np.int32(ZERO)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 0..31 [..., K] and scales float16 [..., K / 32]."""
    return blk.joined(codes_of(blocks)), blocks["d"]


def tile(s):
    """acc = fma(float(dot), w_scale * a_scale, acc): bias is -128 * sum, so bias >> 3 is -16 * sum."""
    return with_zero_points(s, PANEL, U5, 3)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    return half(row_B, block + D) * np.float32(code(row_B, block + FIFTH, block + LOW, i) - ZERO)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    d = peek_f16(block + D)
    first, last = loaded_codes(block + FIFTH, block + LOW)
    store(out, to_f32(first - SIXTEEN) * d * scale)
    store(out + 64, to_f32(last - SIXTEEN) * d * scale)


Q5_0 = Format(
    "q5_0",
    gguf_type=6,
    stored=Stored(BLOCK, 32, unpack, lambda blocks: blk.scaled(codes_of(blocks), blocks["d"], ZERO)),
    packed=Packed(PANEL, 32, lambda codes, d: {**placed(codes), "d": (k_major, d)}, SCALES),
    product=CODES,
    tile=tile,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    zero=ZERO,
    one_row_ahead=2048,
    unpacked=8,
    made_up_scale=2.0**-8,
)
