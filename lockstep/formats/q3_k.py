"""Q3_K: 256 weights in 110 bytes, w = d * sc * q, with sc per 16 weights; q is -4..3, sc is -32..31.

    byte 0..31    bit g of byte i is set unless 4 is taken from weight i of the g-th group of 32
    byte 32..95   low two bits of q: each 32 bytes hold 128 weights, bits 2j and 2j + 1 the j-th 32 of them
    byte 96..107  sc + 32: the low four bits of scale j in byte j % 8 (low nibbles first), the high two bits in byte
                  8 + j % 4, bits 2 (j // 4) and the next
    byte 108..109 d, float16

What is multiplied is (-d) * (-sc) * q: -sc * q is -128..124 and fits a byte, which sc * q does not. A kernel looks
these products up (parts/sixteens.py): with S = sc + 32, the bytes 128 - sc * q of q = -4..-1 are 4 S, 3 S + 32,
2 S + 64, S + 96, and those of q = 0..3 are 128, 160 - S, 192 - 2 S, 224 - 3 S, all of them 0..252.

Source: block_q3_K in ggml-common.h and dequantize_row_q3_K in ggml-quants.c.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts import scalars
from lockstep.formats.parts.dots import byte_dots, scale_add, unpack_bytes
from lockstep.formats.parts.k_scales import block_of, inside, unsigned
from lockstep.formats.parts.layout import offset, offsets, part_bytes
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, bit_pairs, fifth_bits, k_major
from lockstep.formats.parts.scalars import byte, nibble
from lockstep.formats.parts.sixteens import (
    PRODUCT,
    TWO_BITS,
    load_two_bits,
    scaled_codes,
    scales,
    two_bit_code,
    two_bits,
)
from lockstep.native.emit import moved, read
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import bit_and, constant, load_u8, peek_f16, shift_right, store, to_f32

BLOCK = np.dtype([("high", "u1", 32), ("low", "u1", (2, 32)), ("scales", "u1", 12), ("d", "<f2")])
BYTES, (HIGH, LOW, SCALES, D) = BLOCK.itemsize, offsets(BLOCK)
CODES = np.dtype([("low", TWO_BITS), ("high", "u1", (FEATURES, 4))])  # of 32 k
PANEL = np.dtype([("d", "<f4", FEATURES), ("sc", "u1", (16, FEATURES)), ("codes", CODES, 8)])
FOUR = np.int32(4)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int8 -4..3 [..., K], -sc int8 [..., K / 16] and -d float16 [..., K / 256]."""
    return blk.joined(_codes(blocks)), blk.joined(-_scales(blocks)), -blocks["d"]


def _codes(blocks: np.ndarray) -> np.ndarray:
    groups = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks["high"][..., None, :] >> groups & 1).reshape(*blocks.shape, 256)
    return (two_bits(blocks["low"]) | high << 2).view(np.int8) - np.int8(4)


def _scales(blocks: np.ndarray) -> np.ndarray:
    low, shifts = blk.nibbles(blocks["scales"][..., :8]), np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (blocks["scales"][..., None, 8:] >> shifts & 3).reshape(*blocks.shape, 16)
    return (low | high << 4).view(np.int8) - np.int8(32)


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 256]. Error: none, each product is exact in float32."""
    scale = blocks["d"].astype(np.float32)[:, None] * _scales(blocks)
    grouped = _codes(blocks).reshape(-1, 16, 16).astype(np.float32)
    return (scale[:, :, None] * grouped).reshape(-1, 256)


def arrange(codes: np.ndarray, sc: np.ndarray, d: np.ndarray) -> Placed:
    """In a panel, sc is S."""
    codes = (codes + np.int8(4)).view(np.uint8)
    return {
        "codes.low": (bit_pairs, codes & 3),
        "codes.high": (fifth_bits, codes >> 2),
        "sc": (k_major, (np.int8(32) - sc).view(np.uint8)),
        "d": (k_major, d.astype(np.float32)),
    }


def tile(s):
    """acc = fma(float(-sc0 * dot0 - sc1 * dot1), -d * a_scale, acc)."""
    b = s.b

    def block(i, acc):
        start, j = block_of(s, i, PANEL.itemsize)
        codes = b.add(inside(s, start, j, part_bytes(PANEL, "codes")), s.int(offset(PANEL, "codes")))
        sc = b.add(inside(s, start, j, 2 * part_bytes(PANEL, "sc")), s.int(offset(PANEL, "sc")))
        tables = [_tables(s, c, sc) for c in range(s.cols)]
        column, d = unpack_bytes(
            s,
            i,
            lambda c, g: [_column(s, c, codes, g + n, *tables[c]) for n in (0, 1)],
            (s.floats, lambda c: _d(s, c, start)),
        )
        dots = byte_dots(s, i, column)
        return scale_add(s, acc, dots, [d(c) for c in range(s.cols)], i)

    return s.blocks(32, block, PANEL.itemsize // 8)


def _tables(s, c, start):
    """Products of column c for q = -4..-1, and for q = 0..3: of each half of 32 k, four bytes for each feature."""
    b, signs = s.b, 0 if s.target.unsigned else -0x7F7F7F80  # 0x80808080: less 128 in every byte
    number = lambda value: constant(s.ints, value)
    halves = [scales(s, c, b.add(start, s.int(FEATURES * half))) for half in (0, 1)]
    negative = [b.add(b.mul(S, number(0x01020304)), number(0x60402000)) for S in halves]
    positive = [b.sub(number(0xE0C0A080 - (1 << 32)), b.mul(S, number(0x03020100))) for S in halves]
    return [[b.xor(table, number(signs)) for table in tables] for tables in (negative, positive)]


def _column(s, c, start, g, negative, positive):
    """-sc * q of group g, plus 128 where the target's dot takes unsigned weights."""
    b, high = s.b, s.codes(c, start, offset(CODES, "high"))
    is_positive = b.icmp_signed("!=", b.and_(high, constant(high.type, 1 << g)), constant(high.type, 0))
    low, up = (scaled_codes(s, c, start, g, tables) for tables in (negative, positive))
    return b.select(is_positive, up, low)


def _d(s, c, start):
    place = moved(s.b, moved(s.b, s.w[c], start), offset(PANEL, "d") + 4 * s.first[c])
    return read(s.b, place, s.floats, 4 * s.lanes)


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block_B, j = row_B[BYTES * (i // 256) :], i % 256
    g = j // 16
    high = byte(block_B, SCALES + 8 + g % 4) >> 2 * (g // 4) & 3
    sc = np.float32((nibble(block_B, SCALES + g % 8, g // 8) | high << 4) - 32)
    third = byte(block_B, HIGH + j % 32) >> j // 32 & 1
    return scalars.half(block_B, D) * sc * np.float32((two_bit_code(block_B, LOW, j) | third << 2) - 4)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale: 16 bytes serve four times 16 weights, 32 apart."""
    d = peek_f16(block + D)
    for g in range(16):
        low, high = unsigned(block + SCALES + g % 8) >> 4 * (g // 8), unsigned(block + SCALES + 8 + g % 4)
        sc = np.float32((low & 15 | (high >> 2 * (g // 4) & 3) << 4) - 32)
        at = 16 * (g % 2)
        third = bit_and(shift_right(load_u8(block + HIGH + at), g // 2), 1)
        codes = load_two_bits(block + LOW + 32 * (g // 8) + at, g // 2 % 4) + third * FOUR - FOUR
        store(out + 64 * g, to_f32(codes) * (d * sc) * scale)


Q3_K = Format(
    "q3_k",
    gguf_type=11,
    stored=Stored(BLOCK, 256, unpack, decode),
    packed=Packed(PANEL, 256, arrange),
    product=PRODUCT,
    tile=tile,
    few_rows=12,
    unpacked=9,
    is_signed=True,
    lookup=Lookup(weight, store_block, 256),
    fallback="bf16",
    made_up_scale=2.0**-15,
)
