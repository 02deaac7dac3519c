"""Blocks of 256 weights d * sc * q - dmin * m, with sc and m of 6 bits for 32 of them: what Q4_K and Q5_K share.

    byte 0..1    d, float16
    byte 2..3    dmin, float16
    byte 4..15   8 scales sc and 8 minima m (see scales_and_minima)

Codes of 4 or 5 bits follow, in each format in its own way.
"""

import numpy as np

from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import affine_add, feature_half
from lockstep.formats.parts.layout import offset, offsets, part_bytes
from lockstep.formats.parts.panels import PANEL, Placed, k_major
from lockstep.formats.parts.products import ONE_128TH, ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import byte, half, nibble
from lockstep.native.emit import bytes_f32, moved
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import int8
from lockstep.native.simd import constant, fma, peek, peek_f16, store, to_f32

SIZE, GROUP = 256, 32
HEAD = [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12)]  # of a block as stored
PANEL_HEAD = [("d", "<f2", PANEL), ("dmin", "<f2", PANEL), ("sc", "u1", (8, PANEL)), ("m", "u1", (8, PANEL))]
D, DMIN, SCALES = offsets(np.dtype(HEAD))


# ---------------------------------------------------------------- blocks as stored


def unpacked(codes: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Fields of the rows of blocks [..., blocks], for their codes [..., blocks, 256].

    Returns codes uint8 [..., K], d and dmin float16 [..., K / 256], sc and m uint8 0..63 [..., K / 32].
    """
    scales, minima = scales_and_minima(blocks["scales"])
    return blk.joined(codes), blocks["d"], blocks["dmin"], blk.joined(scales), blk.joined(minima)


def low_codes(packed: np.ndarray) -> np.ndarray:
    """Nibbles of blocks uint8 [..., 4, 32], each 32 bytes of which hold 64 weights, low ones first: [..., 256]."""
    return blk.joined(blk.nibbles(packed))


def scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unpack uint8 [..., 12] to scales and minima, uint8 0..63 [..., 8] each.

    Entries 0..3 are the low 6 bits of bytes 0..3 (scales) and 4..7 (minima). Entries 4..7 take their low
    4 bits from the nibbles of bytes 8..11 and their high 2 bits from the top of bytes 0..3 and 4..7.
    """
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return scales, minima


def decoded(codes: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """d * sc * q - dmin * m of blocks [num], float32 [num, 256]. Error: one rounding, of the subtraction."""
    scales, minima = scales_and_minima(blocks["scales"])
    scale = blocks["d"].astype(np.float32)[:, None] * scales
    minimum = blocks["dmin"].astype(np.float32)[:, None] * minima
    grouped = codes.reshape(-1, SIZE // GROUP, GROUP).astype(np.float32)
    return (scale[:, :, None] * grouped - minimum[:, :, None]).reshape(-1, SIZE)


# ---------------------------------------------------------------- products


@definition
def dot_q4_k(a_K, a_scale, codes_K, d, dmin, sc, m):
    """sum of a_scale * a[k] * (d * sc * code[k] - dmin * m), with d, dmin for 256 weights and a_scale, sc, m for 32.

    Codes of 4 or 5 bits; d * sc and dmin * m are exact.

    Order, for each block of 32, ascending from acc = +0, dots exact:
      acc = fma(float(dot), (d * sc) * a_scale, acc)
      acc = fma((dmin * m) / 128, float(-128 * sum of a) * a_scale, acc), where dividing by 128 is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot, total = 0, 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(codes_K[k])
            total += np.int64(a_K[k])
        acc = fma(np.float32(dot), (d[b // 8] * sc[b]) * a_scale[b], acc)
        acc = fma((dmin[b // 8] * m[b]) * ONE_128TH, np.float32(-128 * total) * a_scale[b], acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    d, dmin = floats_at(w.d, n, K // 256), floats_at(w.dmin, n, K // 256)
    sc, m = floats_at(w.sc, n, K // 32), floats_at(w.m, n, K // 32)
    return dot_q4_k(x[0], x[1], codes_at(w.codes, n, K), d, dmin, sc, m)


PRODUCT = Product("q4_k", QUANTIZED, ("codes", "d", "dmin", "sc", "m"), row_dot)


# ---------------------------------------------------------------- panels


def placed(d: np.ndarray, dmin: np.ndarray, sc: np.ndarray, m: np.ndarray) -> Placed:
    """The scales in a panel."""
    return {"d": (k_major, d), "dmin": (k_major, dmin), "sc": (k_major, sc), "m": (k_major, m)}


def block_of(s, i, num_bytes):
    """Start of the block of 256 that holds block i of 32, and i's number in it."""
    return s.b.mul(s.b.lshr(i, s.int(3)), s.int(num_bytes)), s.b.and_(i, s.int(7))


def inside(s, start, j, size):
    """start + j * size."""
    return s.b.add(start, s.b.mul(j, s.int(size)))


def tile(s, panel, codes):
    """acc = fma((dmin * m) / 128, float(bias) * a_scale, fma(float(dot), (d * sc) * a_scale, acc)).

    panel: begins with PANEL_HEAD and ends with eight parts of codes, of 32 k each.
    """
    b = s.b

    def block(i, acc):
        start, j = block_of(s, i, panel.itemsize)
        place = b.add(inside(s, start, j, part_bytes(panel, "codes")), s.int(offset(panel, "codes")))
        part = inside(s, start, j, part_bytes(panel, "sc"))
        d = lambda c: _product(s, c, start, part, panel, "d", "sc")
        m = lambda c: b.fmul(_product(s, c, start, part, panel, "dmin", "m"), constant(s.floats, 2.0**-7))
        return affine_add(s, i, acc, codes.num_groups, codes.at(s, place), d, m)

    return s.blocks(GROUP, block, panel.itemsize * GROUP // SIZE)


def _product(s, c, start, part, panel, half_field, byte_field):
    """A float16 of each feature of column c times a byte of each; start, part: where block and part begin."""
    place = moved(s.b, moved(s.b, s.w[c], part), offset(panel, byte_field) + s.first[c])
    return s.b.fmul(feature_half(s, c, start, offset(panel, half_field)), bytes_f32(s.b, place, s.lanes))


# ---------------------------------------------------------------- single rows


@definition
def low_code(block_B, at, i):
    """The low four bits of weight i: 32 bytes hold 64 weights, the first 32 in their low nibbles."""
    return nibble(block_B, at + 32 * (i // 64) + i % 32, i // 32 % 2)


@definition
def weight(block_B, i, code):
    """d * sc * code - dmin * m."""
    j, at = i // 32, SCALES + i // 32 % 4
    first, second = byte(block_B, at), byte(block_B, at + 4)
    scale = first & 63 if j < 4 else nibble(block_B, at + 8, 0) | first >> 6 << 4
    minimum = second & 63 if j < 4 else nibble(block_B, at + 8, 1) | second >> 6 << 4
    return half(block_B, D) * np.float32(scale) * np.float32(code) - half(block_B, DMIN) * np.float32(minimum)


@inlined
def store_pair(low, high, block, pair, scale, out):
    """Stores sixteen weights of the first 32 of a pair, and sixteen of the second 32, times scale."""
    low_scale, low_minimum = group_scale(block, 2 * pair)
    high_scale, high_minimum = group_scale(block, 2 * pair + 1)
    store(out, (to_f32(low) * low_scale - low_minimum) * scale)
    store(out + 128, (to_f32(high) * high_scale - high_minimum) * scale)


@inlined
def group_scale(block, j) -> tuple:
    """d * sc and dmin * m of the j-th 32 weights."""
    at = block + SCALES + j % 4
    first, second, third = unsigned(at), unsigned(at + 4), unsigned(at + 8)
    sc = first & 63 if j < 4 else third & 15 | first >> 6 << 4
    m = second & 63 if j < 4 else third >> 4 | second >> 6 << 4
    return peek_f16(block + D) * np.float32(sc), peek_f16(block + DMIN) * np.float32(m)


@inlined
def unsigned(address):
    return np.int64(peek(address, int8)) & 255
