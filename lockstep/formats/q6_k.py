"""Q6_K: 256 weights in 210 bytes, w = d * sc * (q - 32), with sc per 16 weights.

    byte 0..127    low four bits: each 64 bytes hold 128 weights, low nibbles the first 64, high the next 64
    byte 128..191  high two bits: each 32 bytes hold 128 weights, bits 2j and 2j + 1 the j-th 32 of them
    byte 192..207  sc, int8
    byte 208..209  d, float16

In a panel the two high bits of the codes k, k + 4, k + 8, k + 12 share a byte, lowest first; they lie beside the low
nibbles of the same 32 k, so that one row reads one stream.

Source: block_q6_K in ggml-common.h and dequantize_row_q6_K in ggml-quants.c.
"""

from functools import partial

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts import scalars
from lockstep.formats.parts.dots import GROUP_BYTES, LOW_BITS, nibbles
from lockstep.formats.parts.k_scales import block_of, inside
from lockstep.formats.parts.layout import offset, offsets, part_bytes
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, bit_pairs, k_major, nibble_pairs
from lockstep.formats.parts.scalars import nibble
from lockstep.formats.parts.sixteens import PRODUCT, two_bit_code, two_bits
from lockstep.native.emit import fma as emit_fma
from lockstep.native.emit import moved, read, spread, vector, words
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import int8
from lockstep.native.simd import (
    F32,
    I8,
    I16,
    I32,
    bit_and,
    constant,
    load_u8,
    peek,
    peek_f16,
    shift_right,
    store,
    to_f32,
)

BLOCK = np.dtype([("low", "u1", (2, 64)), ("high", "u1", (2, 32)), ("sc", "i1", 16), ("d", "<f2")])
BYTES, (LOW, HIGH, SC, D) = BLOCK.itemsize, offsets(BLOCK)
CODES = np.dtype([("low", LOW_BITS), ("high", "u1", (2, FEATURES, 4))])  # of 32 k
PANEL = np.dtype([("d", "<f4", FEATURES), ("sc", "i1", (16, FEATURES)), ("codes", CODES, 8)])
# bytes from 32 weights to the next 32, and from a feature to the next, in each part of a panel
STEPS = {"d": (0, 4), "sc": (2 * FEATURES, 1), "codes.low": (CODES.itemsize, 4), "codes.high": (CODES.itemsize, 4)}
SIXTEEN, THIRTY_TWO = np.int32(16), np.int32(32)


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes int8 -32..31 [..., K], scales int8 [..., K / 16] and d float16 [..., K / 256]."""
    return blk.joined(_codes(blocks)), blk.joined(blocks["sc"]), blocks["d"]


def _codes(blocks: np.ndarray) -> np.ndarray:
    low = blk.nibbles(blocks["low"]).reshape(*blocks.shape, 2, 4, 32)
    codes = low.reshape(*blocks.shape, 256) | two_bits(blocks["high"]) << 4
    return codes.view(np.int8) - np.int8(32)


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 256]. Error: none, each product is exact in float32."""
    scale = blocks["d"].astype(np.float32)[:, None] * blocks["sc"]
    grouped = _codes(blocks).reshape(-1, 16, 16).astype(np.float32)
    return (scale[:, :, None] * grouped).reshape(-1, 256)


def arrange(codes: np.ndarray, sc: np.ndarray, d: np.ndarray) -> Placed:
    codes = (codes + np.int8(32)).view(np.uint8)
    return {
        "codes.low": (nibble_pairs, codes & 15),
        "codes.high": (bit_pairs, codes >> 4),
        "sc": (k_major, sc),
        "d": (k_major, d.astype(np.float32)),
    }


def tile(s):
    """acc = fma(float(sc0 * dot0 + sc1 * dot1), d * a_scale, acc): a scale for the first 16 and one for the last."""
    b = s.b

    def block(i, acc):
        start, j = block_of(s, i, PANEL.itemsize)
        place = partial(_place, s, start, j)
        scale = lambda half: (s.ints, lambda c: _scale(s, place(c, "sc"), half))
        zero = lambda c: _zero_point(s, *(make(c) for _, make in (scale(0), scale(1))))
        d = lambda c: read(b, place(c, "d"), s.floats, 4 * s.lanes)
        codes, first, last, zero, d = s.unpack(
            i, partial(_two_codes, s, place), scale(0), scale(1), (vector(I16, 2 * s.lanes), zero), (s.floats, d)
        )
        for c in range(s.cols):
            pair = partial(zero, c), partial(_sums, s, i)
            of_half = lambda half, g, c=c: codes(c, 4 * half + g)
            sums, d_c = s.target.tiles.scaled_dots(s, i, of_half, (first(c), last(c)), pair), d(c)
            for r in range(s.rows):
                factor = b.fmul(d_c, spread(b, s.a_scale(r, i), F32, s.lanes))
                acc[r, c] = emit_fma(b, b.sitofp(sums[r], s.floats), factor, acc[r, c])
        return acc

    return s.blocks(32, block, PANEL.itemsize // 8)


def _place(s, start, j, c, path):
    """Where column c has a field for the j-th 32 weights of the block of 256 at start."""
    size, feature_bytes = STEPS[path]
    return moved(s.b, moved(s.b, s.w[c], inside(s, start, j, size)), offset(PANEL, path) + feature_bytes * s.first[c])


def _scale(s, scales, half):
    """The int8 scales of a half block, as int32."""
    return s.b.sext(read(s.b, moved(s.b, scales, part_bytes(PANEL, "sc") * half), vector(I8, s.lanes), s.lanes), s.ints)


def _two_codes(s, place, c, g):
    """Codes 0..63 of groups g and g + 1, for an even g: nibbles of low, two bits of high."""
    b, quads = s.b, vector(I8, 4 * s.lanes)
    low, high = moved(b, place(c, "codes.low"), GROUP_BYTES * g // 2), place(c, "codes.high")
    nibble = nibbles(b, s.target, read(b, low, quads, 4 * s.lanes))
    bits = words(b, read(b, moved(b, high, GROUP_BYTES * (g // 4)), quads, 4 * s.lanes))
    shift = lambda move, num_bits: b.bitcast(move(bits, constant(bits.type, num_bits)) if num_bits else bits, quads)
    upper = (shift(b.shl, 0), shift(b.lshr, 2)) if g % 4 else (shift(b.shl, 4), shift(b.shl, 2))
    return [b.or_(n, b.and_(u, constant(quads, 0x30))) for n, u in zip(nibble, upper, strict=True)]


def _zero_point(s, first, last):
    """Pairs of int16, -32 times the two scales: times the sums of activations, they correct for codes 0..63."""
    b = s.b
    both = b.or_(b.and_(first, constant(s.ints, 0xFFFF)), b.shl(last, constant(s.ints, 16)))
    return b.mul(words(b, both), constant(words(b, both).type, -32))


def _sums(s, i, r):
    """The sums of the first and of the last 16 codes of row r, int16."""
    return words(s.b, spread(s.b, s.sums(r, i), I32, s.lanes))


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block_B, j = row_B[BYTES * (i // 256) :], i % 256
    part, k = j // 128, j % 128
    low = nibble(block_B, LOW + 64 * part + k % 64, k // 64)
    high = two_bit_code(block_B, HIGH, j)
    return scalars.half(block_B, D) * np.float32(block_B[SC + j // 16]) * np.float32((low | high << 4) - 32)


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale: 16 bytes of high bits serve four times 16 weights, 32 apart."""
    for i in range(0, 64, 16):
        part, j = i // 32, i % 32
        low, high = block + LOW + 64 * part + j, load_u8(block + HIGH + 32 * part + j)
        first, second = load_u8(low), load_u8(low + 32)
        sc, to = block + SC + 8 * part + j // 16, out + 512 * part + 4 * j
        _store(bit_and(first, 15), high, block, sc, scale, to)
        _store(bit_and(second, 15), shift_right(high, 2), block, sc + 2, scale, to + 128)
        _store(shift_right(first, 4), shift_right(high, 4), block, sc + 4, scale, to + 256)
        _store(shift_right(second, 4), shift_right(high, 6), block, sc + 6, scale, to + 384)


@inlined
def _store(low, high, block, sc, scale, out):
    d_sc = peek_f16(block + D) * np.float32(peek(sc, int8))
    store(out, to_f32(low + bit_and(high, 3) * SIXTEEN - THIRTY_TWO) * d_sc * scale)


Q6_K = Format(
    "q6_k",
    gguf_type=14,
    stored=Stored(BLOCK, 256, unpack, decode),
    packed=Packed(PANEL, 256, arrange),
    product=PRODUCT,
    tile=tile,
    unpacked=12,
    lookup=Lookup(weight, store_block, 256),
    fallback="bf16",
    made_up_scale=2.0**-18,
)
