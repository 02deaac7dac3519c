"""CHANNEL8: 32 weights in 36 bytes, w = d * q, with the same d in all blocks of a row.

    byte 0..3   d, float32
    byte 4..35  q[0..31], int8

No file stores it: int8 weights of Hugging Face folders with a scale for each output channel are read as it
(weights/folders). Such a scale leaves the sum over K: products of many rows have one multiplication less for each block
than Q8_0's, and kernels read nothing but codes.
"""

import numpy as np

from lockstep.formats.format import Format, Lookup, Packed, Stored
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import GROUP_BYTES, byte_dots, stored_bytes
from lockstep.formats.parts.layout import offsets
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, in_fours, k_major, target_bytes
from lockstep.formats.parts.products import ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import single
from lockstep.native.emit import fma as fma_of
from lockstep.native.emit import moved, read, spread
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import float32
from lockstep.native.simd import F32, constant, fma, load_i8, peek, store, to_f32

SIZE = 32
BLOCK = np.dtype([("d", "<f4"), ("codes", "i1", SIZE)])
BYTES, (D, CODES) = BLOCK.itemsize, offsets(BLOCK)
PANEL = np.dtype([("codes", "u1", (8, FEATURES, 4))])  # plus 128 where the target's dot takes unsigned weights
SCALES = np.dtype([("d", "<f4", FEATURES)])  # of a panel, for all of K


def unpack(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [..., K] and scales float32 [..., K / 32]. ValueError where a row has several scales."""
    d = blocks["d"]
    if (d.view(np.uint32) != d[..., :1].view(np.uint32)).any():
        raise ValueError("channel8: a row has several scales, expected one")
    return blk.joined(blocks["codes"]), d


def decode(blocks: np.ndarray) -> np.ndarray:
    """float32 [num, 32]. Error: the rounding of the product, if d has more than 16 bits."""
    return blk.scaled(blocks["codes"], blocks["d"])


def stored_rows(codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Rows as stored, uint8 [rows, bytes], of codes int8 [rows, K] and float32 d [rows, 1]."""
    rows = np.empty((len(codes), codes.shape[1] // SIZE), BLOCK)
    rows["codes"], rows["d"] = codes.reshape(*rows.shape, SIZE), d
    return rows.view(np.uint8).reshape(len(rows), -1)


def arrange(codes: np.ndarray, d: np.ndarray) -> Placed:
    return {"codes": (in_fours, target_bytes(codes)), "d": (k_major, d[:, :1])}


@definition
def dot_channel8(a_K, a_scale, w_K, d):
    """d times the sum over blocks of 32 of (integer dot) * a_scale.

    Order: acc = fma(float(dot of the block), a_scale, acc), blocks ascending from +0, dots exact; then acc * d.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot = 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(w_K[k])
        acc = fma(np.float32(dot), a_scale[b], acc)
    return acc * d


@inlined
def row_dot(x, w, n, K):
    return dot_channel8(x[0], x[1], codes_at(w.codes, n, K), floats_at(w.d, n, K // SIZE)[0])


def tile(s):
    """acc = fma(float(dot), a_scale, acc) for every block, then acc * d."""
    b = s.b

    def block(i, acc):
        start = b.mul(i, s.int(PANEL.itemsize))
        dots = byte_dots(s, i, stored_bytes(s, i, lambda c, g: s.codes(c, start, GROUP_BYTES * g)))
        scales = [spread(b, s.a_scale(r, i), F32, s.lanes) for r in range(s.rows)]
        return {(r, c): fma_of(b, b.sitofp(dots[r, c], s.floats), scales[r], acc[r, c]) for r, c in s.cells}

    sums = s.blocks(SIZE, block, PANEL.itemsize)
    scales = [_row_scales(s, c) for c in range(s.cols)]
    return {(r, c): b.fmul(v, scales[c]) for (r, c), v in sums.items()}


def _row_scales(s, c):
    """d of each feature of a column behind the last part of K, 1 (which changes nothing) behind the others."""
    d = read(s.b, moved(s.b, s.scales[c], 4 * s.first[c]), s.floats, 4 * s.lanes)
    return s.b.select(s.is_last, d, constant(s.floats, 1.0))


@definition
def weight(row_B, i):
    """Weight i of a row."""
    block = BYTES * (i // SIZE)
    return single(row_B, block + D) * np.float32(row_B[block + CODES + i % SIZE])


@inlined
def store_block(block, scale, out):
    """Stores the weights of a block times scale."""
    d = peek(block + D, float32)
    for i in range(0, SIZE, 16):
        store(out + 4 * i, to_f32(load_i8(block + CODES + i)) * d * scale)


CHANNEL8 = Format(
    "channel8",
    gguf_type=None,
    stored=Stored(BLOCK, SIZE, unpack, decode),
    packed=Packed(PANEL, SIZE, arrange, SCALES, per_row=True),
    product=Product("channel8", QUANTIZED, ("codes", "d"), row_dot),
    tile=tile,
    lookup=Lookup(weight, store_block, SIZE),
    fallback="f32",
    is_signed=True,
    made_up_scale=2.0**-12,
)
