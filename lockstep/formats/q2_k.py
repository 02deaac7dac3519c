"""Q2_K: 256 weights in 84 bytes, w = d * sc * q - dmin * m, with sc and m of 4 bits per 16 weights; q is 0..3.

    byte 0..15   sc (low nibbles) and m (high nibbles)
    byte 16..79  q: each 32 bytes hold 128 weights, bits 2j and 2j + 1 the j-th 32 of them
    byte 80..81  d, float16
    byte 82..83  dmin, float16

sc * q is at most 45: a kernel looks it up (parts/sixteens.py).

Source: block_q2_K in ggml-common.h and dequantize_row_q2_K in ggml-quants.c.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts import scalars
from lockstep.formats.parts.dots import feature_half, unsigned_dots
from lockstep.formats.parts.k_scales import block_of, inside, unsigned
from lockstep.formats.parts.layout import offset, offsets, part_bytes
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, bit_pairs, k_major
from lockstep.formats.parts.products import ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import byte
from lockstep.formats.parts.sixteens import (
    TWO_BITS,
    load_two_bits,
    scaled_codes,
    scales,
    two_bit_code,
    two_bits,
)
from lockstep.native.emit import fma as emit_fma
from lockstep.native.emit import spread
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import F32, I32, constant, fma, peek_f16, store, to_f32

BLOCK = np.dtype([("scales", "u1", 16), ("codes", "u1", (2, 32)), ("d", "<f2"), ("dmin", "<f2")])
BYTES, (SCALES, CODES, D, DMIN) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype(
    [
        ("d", "<f2", FEATURES),
        ("dmin", "<f2", FEATURES),
        ("scales", "u1", (16, FEATURES)),
        ("codes", TWO_BITS.base, (8, *TWO_BITS.shape)),
    ]
)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes uint8 0..3 [..., K], d and dmin float16 [..., K / 256], sc and m uint8 0..15 [..., K / 16]."""
    low, high = blocks["scales"] & 15, blocks["scales"] >> 4
    return blk.joined(two_bits(blocks["codes"])), blocks["d"], blocks["dmin"], blk.joined(low), blk.joined(high)


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 256]. Error: one rounding, of the subtraction."""
    scale = blocks["d"].astype(np.float32)[:, None] * (blocks["scales"] & 15)
    minimum = blocks["dmin"].astype(np.float32)[:, None] * (blocks["scales"] >> 4)
    grouped = two_bits(blocks["codes"]).reshape(-1, 16, 16).astype(np.float32)
    return (scale[:, :, None] * grouped - minimum[:, :, None]).reshape(-1, 256)


def arrange(codes: np.ndarray, d: np.ndarray, dmin: np.ndarray, sc: np.ndarray, m: np.ndarray) -> Placed:
    return {
        "codes": (bit_pairs, codes),
        "scales": (k_major, sc | m << 4),
        "d": (k_major, d),
        "dmin": (k_major, dmin),
    }


@definition
def dot_q2_k(a_K, a_scale, codes_K, d, dmin, sc, m):
    """sum of a_scale * a[k] * (d * sc * code[k] - dmin * m), d and dmin for 256 weights, a_scale for 32, sc, m for 16.

    Order, for each block of 32, ascending from acc = +0; the integers, of the block's first and last 16, are exact:
      acc = fma(fma(float(sc0 * dot0 + sc1 * dot1), d, float(m0 * sum0 + m1 * sum1) * -dmin), a_scale, acc),
      where sum0, sum1 are those of a.
    """
    acc = ZERO
    for b in range(a_scale.size):
        total, subtracted = 0, 0
        for k in range(32 * b, 32 * b + 32):
            total += np.int64(sc[k // 16]) * np.int64(a_K[k]) * np.int64(codes_K[k])
            subtracted += np.int64(m[k // 16]) * np.int64(a_K[k])
        value = fma(np.float32(total), d[b // 8], np.float32(subtracted) * -dmin[b // 8])
        acc = fma(value, a_scale[b], acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    d, dmin = floats_at(w.d, n, K // 256), floats_at(w.dmin, n, K // 256)
    sc, m = floats_at(w.sc, n, K // 16), floats_at(w.m, n, K // 16)
    return dot_q2_k(x[0], x[1], codes_at(w.codes, n, K), d, dmin, sc, m)


def tile(s):
    """acc = fma(fma(float(sc0 * dot0 + sc1 * dot1), d, float(m0 * sum0 + m1 * sum1) * -dmin), a_scale, acc)."""
    b = s.b

    def block(i, acc):
        start, j = block_of(s, i, PANEL.itemsize)
        codes = b.add(inside(s, start, j, part_bytes(PANEL, "codes")), s.int(offset(PANEL, "codes")))
        both = b.add(inside(s, start, j, 2 * part_bytes(PANEL, "scales")), s.int(offset(PANEL, "scales")))
        halves = [[scales(s, c, b.add(both, s.int(FEATURES * half))) for half in (0, 1)] for c in range(s.cols)]
        tables = [[_table(s, v) for v in pair] for pair in halves]
        d = lambda c: feature_half(s, c, start, offset(PANEL, "d"))
        pairs, *others = s.unpack(
            i,
            lambda c, g: [scaled_codes(s, c, codes, g + n, tables[c]) for n in (0, 1)],
            (s.ints, lambda c: _minima(s, *halves[c])),
            (s.floats, d),
            (s.floats, lambda c: b.fneg(feature_half(s, c, start, offset(PANEL, "dmin")))),
        )
        dots, columns = unsigned_dots(s, i, pairs, None, 2), range(s.cols)
        return _add(s, i, acc, dots, *([make(c) for c in columns] for make in others))

    return s.blocks(32, block, PANEL.itemsize // 8)


def _table(s, scale):
    """Products of the low nibble with 0..3, in four bytes."""
    return s.b.mul(s.b.and_(scale, constant(s.ints, 15)), constant(s.ints, 0x03020100))


def _minima(s, first, last):
    """The high nibbles of two bytes of each feature, as pairs of int16."""
    b = s.b
    return b.or_(b.lshr(first, constant(s.ints, 4)), b.shl(b.and_(last, constant(s.ints, 0xF0)), constant(s.ints, 12)))


def _add(s, i, acc, dots, minima, d, minus_dmin):
    """The float32 steps of block i, cell by cell."""
    b, after = s.b, {}
    for r in range(s.rows):
        a_scale, sums = spread(b, s.a_scale(r, i), F32, s.lanes), spread(b, s.sums(r, i), I32, s.lanes)
        for c in range(s.cols):
            subtracted = s.target.pair_dot(b, constant(s.ints, 0), minima[c], sums)
            value = b.fmul(b.sitofp(subtracted, s.floats), minus_dmin[c])
            value = emit_fma(b, b.sitofp(dots[r, c], s.floats), d[c], value)
            after[r, c] = emit_fma(b, value, a_scale, acc[r, c])
    return after


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block_B, j = row_B[BYTES * (i // 256) :], i % 256
    scale = byte(block_B, SCALES + j // 16)
    product = scalars.half(block_B, D) * np.float32(scale & 15) * np.float32(two_bit_code(block_B, CODES, j))
    return product - scalars.half(block_B, DMIN) * np.float32(scale >> 4)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale: 16 bytes serve four times 16 weights, 32 apart."""
    d, dmin = peek_f16(block + D), peek_f16(block + DMIN)
    for g in range(16):
        both = unsigned(block + SCALES + g)
        codes = load_two_bits(block + CODES + 32 * (g // 8) + 16 * (g % 2), g // 2 % 4)
        store(out + 64 * g, (to_f32(codes) * (d * np.float32(both & 15)) - dmin * np.float32(both >> 4)) * scale)


Q2_K = Format(
    "q2_k",
    gguf_type=10,
    stored=Stored(BLOCK, 256, unpack, decode),
    packed=Packed(PANEL, 256, arrange),
    product=Product("q2_k", QUANTIZED, ("codes", "d", "dmin", "sc", "m"), row_dot),
    tile=tile,
    lookup=Lookup(weight, store_block, 256),
    fallback="bf16",
    few_rows=12,
    unpacked=11,
    made_up_scale=2.0**-13,
)
