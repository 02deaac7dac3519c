"""GROUP4: 64 weights in 40 bytes, w = d * q + m, with codes of 4 bits.

    byte 0..3   d, float32
    byte 4..7   m, float32
    byte 8..39  q: low nibbles the first 32, high nibbles the last

No file stores it: integer weights of Hugging Face folders in groups of 64 or more are read as it (weights/folders).
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts import groups
from lockstep.formats.parts.dots import LOW_BITS, U4, unsigned_dots
from lockstep.formats.parts.layout import offset
from lockstep.formats.parts.panels import Placed, nibble_pairs
from lockstep.formats.parts.products import ONE_128TH, ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import nibble
from lockstep.native.emit import fma as fma_of
from lockstep.native.emit import read, spread
from lockstep.native.kernel import definition, inlined
from lockstep.native.simd import F32, I32, bit_and, call, fma, load_u8, shift_right, splat

SIZE, TIMES = 64, 2
BLOCK = np.dtype([*groups.HEAD, ("codes", "u1", 32)])
BYTES = BLOCK.itemsize
PANEL = np.dtype([*groups.PANEL_HEAD, ("codes", LOW_BITS.base, (TIMES, *LOW_BITS.shape))])


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 0..15 [..., K], d and m float32 [..., K / 64]."""
    return blk.joined(blk.nibbles(blocks["codes"])), blocks["d"], blocks["m"]


def arrange(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> Placed:
    return {"codes": (nibble_pairs, codes), **groups.placed(d, m)}


def stored_rows(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Rows as stored, of codes 0..15 uint8 [rows, K] and float32 d, m [rows, K / 64]."""
    low, high = np.moveaxis(codes.reshape(*d.shape, 2, 32), 2, 0)
    return groups.block_rows(BLOCK, low | high << 4, d, m)


@definition
def dot_group4(a_K, a_scale, codes_K, d, m):
    """sum of a_scale * a[k] * (d * code[k] + m), with a_scale for 32 weights, d and m for 64.

    Order, for each block of 64, ascending from acc = +0, dots exact; 0 and 1 are its first and its last 32:
      acc = fma(fma(float(dot0), a_scale0, float(dot1) * a_scale1), d, acc)
      acc = fma(fma(bias0, a_scale0, bias1 * a_scale1), m * (-1 / 128), acc), with bias = float(-128 * sum of a).
    """
    acc = ZERO
    for b in range(d.size):
        dots, biases = ZERO, ZERO
        for part in range(2 * b + 1, 2 * b - 1, -1):
            dot, total = 0, 0
            for k in range(32 * part, 32 * part + 32):
                dot += np.int64(a_K[k]) * np.int64(codes_K[k])
                total += np.int64(a_K[k])
            dots = fma(np.float32(dot), a_scale[part], dots)
            biases = fma(np.float32(-128 * total), a_scale[part], biases)
        acc = fma(dots, d[b], acc)
        acc = fma(biases, m[b] * -ONE_128TH, acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    d, m = floats_at(w.d, n, K // SIZE), floats_at(w.m, n, K // SIZE)
    return dot_group4(x[0], x[1], codes_at(w.codes, n, K), d, m)


def tile(s):
    """acc = fma(biases, m * (-1 / 128), fma(dots, d, acc)): a_scale is in dots and biases, m * (-1 / 128) in panels."""
    b = s.b

    def block(i, acc):
        start = b.mul(i, s.int(PANEL.itemsize))
        d, m = (groups.floats(s, start, offset(PANEL, field)) for field in ("d", "m"))
        numbers, dots = [b.add(b.mul(i, s.int(TIMES)), s.int(part)) for part in range(TIMES)], None
        for part in (1, 0):
            codes = b.add(start, s.int(offset(PANEL, "codes") + LOW_BITS.itemsize * part))
            sums = unsigned_dots(s, numbers[part], U4.at(s, codes), None, U4.num_groups)
            dots = _scaled(s, numbers[part], sums, dots)
        factors = [splat(b, _biases(s, r, numbers), s.floats) for r in range(s.rows)]
        acc = {(r, c): fma_of(b, dots[r, c], d[c], v) for (r, c), v in acc.items()}
        return {(r, c): fma_of(b, factors[r], m[c], v) for (r, c), v in acc.items()}

    return s.blocks(SIZE, block, PANEL.itemsize)


def _scaled(s, i, dots, before):
    """fma(float(dot), a_scale, before), or the product alone, cell by cell."""
    b, after = s.b, {}
    for r in range(s.rows):
        a_scale = spread(b, s.a_scale(r, i), F32, s.lanes)
        for c in range(s.cols):
            dot = b.sitofp(dots[r, c], s.floats)
            after[r, c] = fma_of(b, dot, a_scale, before[r, c]) if before else b.fmul(dot, a_scale)
    return after


def _biases(s, r, numbers):
    """fma(bias0, a_scale0, bias1 * a_scale1) of a row."""
    b = s.b
    (bias0, scale0), (bias1, scale1) = [
        (b.sitofp(read(b, s.bias(r, i), I32, 4), F32), read(b, s.a_scale(r, i), F32, 4)) for i in numbers
    ]
    return call(b, "llvm.fma.f32", F32, [bias0, scale0, b.fmul(bias1, scale1)])


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block, j = BYTES * (i // SIZE), i % SIZE
    return groups.affine(row_B, block, nibble(row_B, block + groups.CODES + j % 32, j // 32))


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    for i in range(0, 32, 16):
        codes = load_u8(block + groups.CODES + i)
        groups.store_affine(bit_and(codes, 15), block, scale, out + 4 * i)
        groups.store_affine(shift_right(codes, 4), block, scale, out + 128 + 4 * i)


GROUP4 = Format(
    "group4",
    gguf_type=None,
    stored=Stored(BLOCK, SIZE, unpack, lambda blocks: groups.decoded(blk.nibbles(blocks["codes"]), blocks)),
    packed=Packed(PANEL, SIZE, arrange),
    product=Product("group4", QUANTIZED, ("codes", "d", "m"), row_dot),
    tile=tile,
    lookup=Lookup(weight, store_block, SIZE),
    fallback="f32",
    one_row_ahead=2048,
    made_up_scale=2.0**-8,
)
