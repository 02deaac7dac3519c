"""MXFP4: 32 weights in 17 bytes, w = 2^(e - 127) * F[q], where F has the 16 floats with two bits of exponent and one
of fraction: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives.

    byte 0      e, uint8
    byte 1..16  low nibble of byte 1 + i is q[i], high nibble is q[i + 16]

Codes are multiplied as the integers 2 F[q], exactly; their scale is 2^(e - 128).
Source: block_mxfp4 and kvalues_mxfp4 in ggml-common.h; OCP Microscaling Formats (MX) 1.0.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import LOW_BITS, scale_add
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import Placed, k_major, nibble_pairs
from lockstep.formats.parts.powers import (
    E8M0,
    POWERS,
    bytes_of,
    checked_halves,
    half_power,
    halves,
    peek_half_power,
    power_scales,
)
from lockstep.formats.parts.products import CODES as PRODUCT
from lockstep.formats.parts.tables import (
    TWICE_E2M1,
    TWICE_E2M1_WORDS,
    entries,
    entry_dots,
    load_entries,
    twice_e2m1,
)
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import store, to_f32

BLOCK = np.dtype([("e", E8M0), ("codes", "u1", 16)])
BYTES, (E, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("codes", LOW_BITS)])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [..., K] and scales float32 [..., K / 32], infinite where a weight might be."""
    return blk.joined(blk.nibbles(blocks["codes"])), checked_halves(blocks["e"])


def from_pairs(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows of blocks, uint8 [rows, bytes], from Hugging Face's two arrays: codes uint8 [rows, blocks, 16], two
    neighbours a byte, the first in its low nibble, and scales e, uint8 [rows, blocks]."""
    blocks = np.empty(scales.shape, BLOCK)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, 32)
    blocks["e"], blocks["codes"] = scales.view(E8M0), pairs[..., :16] | pairs[..., 16:] << 4
    return blocks.view(np.uint8)


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 32]. Error: none, each product is exact in float32."""
    return blk.scaled(entries(blocks["codes"], TWICE_E2M1), halves(blocks["e"]))


def arrange(codes: np.ndarray, d: np.ndarray) -> Placed:
    return {"codes": (nibble_pairs, codes), "d": (k_major, bytes_of(d))}


def tile(s):
    """acc = fma(float(dot), w_scale * a_scale, acc)."""

    def block(i, acc):
        dots = entry_dots(s, i, s.b.mul(i, s.int(PANEL.itemsize)), TWICE_E2M1)
        return scale_add(s, acc, dots, power_scales(s, i), i)

    return s.blocks(32, block, PANEL.itemsize, POWERS.itemsize)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // 32)
    return half_power(row_B, block + E) * twice_e2m1(row_B, block + CODES, i)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    d = peek_half_power(block + E)
    first, last = load_entries(block + CODES, TWICE_E2M1_WORDS)
    store(out, to_f32(first) * d * scale)
    store(out + 64, to_f32(last) * d * scale)


MXFP4 = Format(
    "mxfp4",
    gguf_type=39,
    stored=Stored(BLOCK, 32, unpack, decode),
    packed=Packed(PANEL, 32, arrange, POWERS),
    product=PRODUCT,
    tile=tile,
    unpacked=8,
    lookup=Lookup(weight, store_block, 32),
    fallback="f32",
    table=TWICE_E2M1,
    made_up_scale=2.0**-8,
)
