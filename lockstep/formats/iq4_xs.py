"""IQ4_XS: 256 weights in 136 bytes, w = d * sc * T[q], with sc per 32 weights; T is a table whose steps grow.

    byte 0..1    d, float16
    byte 2..3    bits 2g and 2g + 1: the high two bits of sc + 32 of group g of 32 weights
    byte 4..7    the low four bits of sc + 32, two groups a byte, the first in its low nibble
    byte 8..135  q: 16 bytes for each group, low nibbles its first 16 weights, high nibbles its last 16

Source: block_iq4_xs in ggml-common.h and dequantize_row_iq4_xs in ggml-quants.c.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import LOW_BITS, byte_dots, scale_add, unpack_bytes
from lockstep.formats.parts.k_scales import block_of, inside
from lockstep.formats.parts.layout import offset, offsets, part_bytes
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, k_major, nibble_pairs
from lockstep.formats.parts.products import ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import byte, half, nibble
from lockstep.formats.parts.tables import (
    NONLINEAR,
    NONLINEAR_WORDS,
    entries,
    entries_at,
    load_entries,
    nonlinear,
)
from lockstep.native.emit import moved, read, vector
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import uint8, uint16
from lockstep.native.simd import I8, fma, peek, peek_f16, store, to_f32

BLOCK = np.dtype([("d", "<f2"), ("high", "<u2"), ("low", "u1", 4), ("codes", "u1", (8, 16))])
BYTES, (D, HIGH, LOW, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("d", "<f4", FEATURES), ("sc", "i1", (8, FEATURES)), ("codes", LOW_BITS.base, (8, *LOW_BITS.shape))])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [..., K], scales int8 -32..31 [..., K / 32] and d float16 [..., K / 256]."""
    return blk.joined(blk.joined(blk.nibbles(blocks["codes"]))), blk.joined(_scales(blocks)), blocks["d"]


def _scales(blocks: np.ndarray) -> np.ndarray:
    low = np.stack([blocks["low"] & 15, blocks["low"] >> 4], axis=-1).reshape(*blocks.shape, 8)
    high = (blocks["high"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    return (low | high << 4).view(np.int8) - np.int8(32)


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 256]. Error: none, each product is exact in float32."""
    scale = blocks["d"].astype(np.float32)[:, None] * _scales(blocks)
    return (scale[:, :, None] * entries(blocks["codes"], NONLINEAR).astype(np.float32)).reshape(-1, 256)


def arrange(codes: np.ndarray, sc: np.ndarray, d: np.ndarray) -> Placed:
    return {
        "codes": (nibble_pairs, codes),
        "sc": (k_major, sc),
        "d": (k_major, d.astype(np.float32)),
    }


@definition
def dot_scaled(a_K, a_scale, w_K, sc, d):
    """sum of a_scale * a[k] * d * sc * w[k], with d for 256 weights, a_scale and the integer sc for 32.

    Order: acc = fma(float(dot of the block), (d * sc) * a_scale, acc) for each block of 32, ascending from +0; the dot
      and d * sc are exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot = 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(w_K[k])
        acc = fma(np.float32(dot), (d[b // 8] * np.float32(sc[b])) * a_scale[b], acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    sc, d = codes_at(w.sc, n, K // 32), floats_at(w.d, n, K // 256)
    return dot_scaled(x[0], x[1], codes_at(w.codes, n, K), sc, d)


def tile(s):
    """acc = fma(float(dot), (d * sc) * a_scale, acc)."""
    b = s.b

    def block(i, acc):
        start, j = block_of(s, i, PANEL.itemsize)
        codes = b.add(inside(s, start, j, part_bytes(PANEL, "codes")), s.int(offset(PANEL, "codes")))
        group = inside(s, start, j, part_bytes(PANEL, "sc"))
        d = lambda c: _product(s, c, start, group)
        column, d = unpack_bytes(s, i, entries_at(s, codes, NONLINEAR), (s.floats, d))
        return scale_add(s, acc, byte_dots(s, i, column), [d(c) for c in range(s.cols)], i)

    return s.blocks(32, block, PANEL.itemsize // 8)


def _product(s, c, start, group):
    """d * sc of each feature of column c; start, group: where the fields of the block and of its group begin."""
    b, w, first = s.b, s.w[c], s.first[c]
    d = read(b, moved(b, moved(b, w, start), offset(PANEL, "d") + 4 * first), s.floats, 4 * s.lanes)
    place = moved(b, moved(b, w, group), offset(PANEL, "sc") + first)
    sc = b.sext(read(b, place, vector(I8, s.lanes), s.lanes), s.ints)
    return b.fmul(d, b.sitofp(sc, s.floats))


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block_B, j = row_B[BYTES * (i // 256) :], i % 256
    g = j // 32
    high = byte(block_B, HIGH + g // 4) >> 2 * (g % 4) & 3
    sc = np.float32((nibble(block_B, LOW + g // 2, g % 2) | high << 4) - 32)
    return half(block_B, D) * sc * nonlinear(block_B, CODES + 16 * g, j)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale, group after group."""
    high, d = np.int64(peek(block + HIGH, uint16)), peek_f16(block + D)
    for g in range(8):
        low = np.int64(peek(block + LOW + g // 2, uint8)) >> 4 * (g % 2) & 15
        d_sc = d * np.float32((low | (high >> 2 * g & 3) << 4) - 32)
        first, last = load_entries(block + CODES + 16 * g, NONLINEAR_WORDS)
        store(out + 128 * g, to_f32(first) * d_sc * scale)
        store(out + 128 * g + 64, to_f32(last) * d_sc * scale)


IQ4_XS = Format(
    "iq4_xs",
    gguf_type=23,
    stored=Stored(BLOCK, 256, unpack, decode),
    packed=Packed(PANEL, 256, arrange),
    product=Product("scaled", QUANTIZED, ("codes", "sc", "d"), row_dot),
    tile=tile,
    unpacked=9,
    is_signed=True,
    lookup=Lookup(weight, store_block, 256),
    fallback="bf16",
    table=NONLINEAR,
    made_up_scale=2.0**-16,
)
