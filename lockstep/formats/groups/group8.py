"""GROUP8: 32 weights in 40 bytes, w = d * q + m, with codes of 8 bits.

    byte 0..3   d, float32
    byte 4..7   m, float32
    byte 8..39  q[0..31], uint8

No file stores it: integer weights of Hugging Face folders are read as it that GROUP4 has no room for (weights/folders).
Kernels for instructions that multiply signed weights have the codes less 128, and put the 128 back as -bias.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts import groups
from lockstep.formats.parts.dots import GROUP_BYTES, byte_dots, minimum_add, scale_add, unsigned_dots, zero_points
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, in_fours, target_bytes
from lockstep.formats.parts.products import ONE_128TH, ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import byte
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import fma, load_u8

SIZE = 32
BLOCK = np.dtype([*groups.HEAD, ("codes", "u1", SIZE)])
BYTES = BLOCK.itemsize
PANEL = np.dtype([*groups.PANEL_HEAD, ("codes", "u1", (8, FEATURES, 4))])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes less 128, int8 [..., K], d and m float32 [..., K / 32]."""
    return blk.joined((blocks["codes"] ^ np.uint8(128)).view(np.int8)), blocks["d"], blocks["m"]


def arrange(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> Placed:
    return {"codes": (in_fours, target_bytes(codes)), **groups.placed(d, m)}


def stored_rows(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Rows as stored, of codes uint8 [rows, K] and float32 d, m [rows, K / 32]."""
    return groups.block_rows(BLOCK, codes.reshape(*d.shape, SIZE), d, m)


@definition
def dot_group8(a_K, a_scale, codes_K, d, m):
    """sum of a_scale * a[k] * (d * q[k] + m), with a_scale, d and m for 32 weights; codes are q - 128.

    Order, for each block of 32, ascending from acc = +0, dots of q exact:
      acc = fma(float(dot), d * a_scale, acc)
      acc = fma(m * (-1 / 128), float(-128 * sum of a) * a_scale, acc).
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot, total = 0, 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * (np.int64(codes_K[k]) + 128)
            total += np.int64(a_K[k])
        acc = fma(np.float32(dot), d[b] * a_scale[b], acc)
        acc = fma(m[b] * -ONE_128TH, np.float32(-128 * total) * a_scale[b], acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    d, m = floats_at(w.d, n, K // 32), floats_at(w.m, n, K // 32)
    return dot_group8(x[0], x[1], codes_at(w.codes, n, K), d, m)


def dots_u8(s, i, start):
    """Dots of block i with the codes 0..255 that begin `start` bytes into the panels."""
    column = lambda c, g: s.codes(c, start, GROUP_BYTES * g)
    if s.target.unsigned:
        return unsigned_dots(s, i, lambda c, g: [column(c, g), column(c, g + 1)], None, 2)
    dots, biases = byte_dots(s, i, column), zero_points(s, i, 0)
    return {(r, c): s.b.sub(v, biases[r]) for (r, c), v in dots.items()}


def tile(s):
    """acc = fma(m * (-1 / 128), float(bias) * a_scale, fma(float(dot), d * a_scale, acc)); panels have m * (-1 / 128)
    and rows float(bias) * a_scale."""
    b = s.b

    def block(i, acc):
        start = b.mul(i, s.int(PANEL.itemsize))
        d, m = (groups.floats(s, start, offset(PANEL, field)) for field in ("d", "m"))
        sums = dots_u8(s, i, b.add(start, s.int(offset(PANEL, "codes"))))
        acc = scale_add(s, acc, sums, d, i)
        return minimum_add(s, acc, m, i)

    return s.blocks(SIZE, block, PANEL.itemsize)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // SIZE)
    return groups.affine(row_B, block, byte(row_B, block + groups.CODES + i % SIZE))


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    for i in range(0, SIZE, 16):
        groups.store_affine(load_u8(block + groups.CODES + i), block, scale, out + 4 * i)


GROUP8 = Format(
    "group8",
    gguf_type=None,
    stored=Stored(BLOCK, SIZE, unpack, lambda blocks: groups.decoded(blocks["codes"], blocks)),
    packed=Packed(PANEL, SIZE, arrange),
    product=Product("group8", QUANTIZED, ("codes", "d", "m"), row_dot),
    tile=tile,
    lookup=Lookup(weight, store_block, SIZE),
    fallback="f32",
    tall_tiles=True,
    made_up_scale=2.0**-12,
)
