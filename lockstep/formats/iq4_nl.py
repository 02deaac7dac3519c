"""IQ4_NL: 32 weights in 18 bytes, w = d * T[q], where T is a table whose steps grow.

    byte 0..1   d, float16
    byte 2..17  low nibble of byte 2 + i is q[i], high nibble is q[i + 16]

Source: block_iq4_nl and kvalues_iq4nl in ggml-common.h.
"""

import numpy as np

from lockstep.formats.format import SCALES, Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import LOW_BITS, scale_add, w_scales
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import Placed, k_major, nibble_pairs
from lockstep.formats.parts.products import CODES as PRODUCT
from lockstep.formats.parts.scalars import half
from lockstep.formats.parts.tables import (
    NONLINEAR,
    NONLINEAR_WORDS,
    entries,
    entry_dots,
    load_entries,
    nonlinear,
)
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import peek_f16, store, to_f32

BLOCK = np.dtype([("d", "<f2"), ("codes", "u1", 16)])
BYTES, (D, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("codes", LOW_BITS)])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [..., K] and scales float16 [..., K / 32]."""
    return blk.joined(blk.nibbles(blocks["codes"])), blocks["d"]


def arrange(codes: np.ndarray, d: np.ndarray) -> Placed:
    return {"codes": (nibble_pairs, codes), "d": (k_major, d)}


def tile(s):
    """acc = fma(float(dot), w_scale * a_scale, acc)."""

    def block(i, acc):
        dots = entry_dots(s, i, s.b.mul(i, s.int(PANEL.itemsize)), NONLINEAR)
        return scale_add(s, acc, dots, w_scales(s, i), i)

    return s.blocks(32, block, PANEL.itemsize, SCALES.itemsize)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    return half(row_B, block + D) * nonlinear(row_B, block + CODES, i)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    d = peek_f16(block + D)
    first, last = load_entries(block + CODES, NONLINEAR_WORDS)
    store(out, to_f32(first) * d * scale)
    store(out + 64, to_f32(last) * d * scale)


IQ4_NL = Format(
    "iq4_nl",
    gguf_type=20,
    stored=Stored(BLOCK, 32, unpack, lambda b: blk.scaled(entries(b["codes"], NONLINEAR), b["d"])),
    packed=Packed(PANEL, 32, arrange, SCALES),
    product=PRODUCT,
    tile=tile,
    unpacked=8,
    is_signed=True,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    table=NONLINEAR,
    made_up_scale=2.0**-11,
)
