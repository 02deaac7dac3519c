"""Floats of 4 bits (E2M1) with a scale for every 16: what both forms of NVFP4 share.

Codes are multiplied as the integers 2 F[q], exactly; d is half of a weight's scale, as float32.
"""

import numpy as np

from lockstep.formats.format import Packed
from lockstep.formats.parts import blocks as blk
from lockstep.formats.parts.dots import LOW_BITS, half_dots, scale_add
from lockstep.formats.parts.layout import offset, part_bytes
from lockstep.formats.parts.panels import PANEL as FEATURES
from lockstep.formats.parts.panels import Placed, k_major, nibble_pairs
from lockstep.formats.parts.products import ZERO, Product, codes_at, floats_at
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.scalars import nibble
from lockstep.formats.parts.tables import TWICE_E2M1, entries_at
from lockstep.native.emit import moved, read
from lockstep.native.isa.dots import each
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import uint8
from lockstep.native.simd import fma, peek, poke

SIZE, PARTS = 64, 4  # weights of a block, and its scales
PAIRS = np.dtype(("u1", (PARTS, 8)))  # codes of a block: low nibbles the first 8 of 16, high nibbles the last
PANEL = np.dtype([("d", "<f4", (PARTS, FEATURES)), ("codes", LOW_BITS.base, (2, *LOW_BITS.shape))])


def codes_of(pairs: np.ndarray) -> np.ndarray:
    """Codes uint8 [..., 64] of `PAIRS` [..., 4, 8]."""
    return blk.joined(blk.nibbles(pairs))


def pairs_of(codes: np.ndarray) -> np.ndarray:
    """The reverse: uint8 [..., 64] to [..., 4, 8]."""
    low, high = np.moveaxis(codes.reshape(*codes.shape[:-1], PARTS, 2, 8), -2, 0)
    return low | high << 4


def decoded(pairs: np.ndarray, d: np.ndarray) -> np.ndarray:
    """float32 [num, 64] of `PAIRS` [num, 4, 8] and d [num, 4]. Error: the rounding of one product."""
    entries = TWICE_E2M1[blk.nibbles(pairs)].astype(np.float32)
    return (entries * d[..., None]).reshape(-1, SIZE)


def arrange(codes: np.ndarray, d: np.ndarray) -> Placed:
    return {"codes": (nibble_pairs, codes), "d": (k_major, d)}


@definition
def dot_sixteens(a_K, a_scale, w_K, d):
    """sum of a_scale * a[k] * d * w[k], with a_scale for 32 weights and d for 16.

    Order: acc = fma(float(dot of 16), d * a_scale, acc), ascending from +0; the dot is exact.
    """
    acc = ZERO
    for part in range(d.size):
        dot = 0
        for k in range(16 * part, 16 * part + 16):
            dot += np.int64(a_K[k]) * np.int64(w_K[k])
        acc = fma(np.float32(dot), d[part] * a_scale[part // 2], acc)
    return acc


@inlined
def row_dot(x, w, n, K):
    return dot_sixteens(x[0], x[1], codes_at(w.codes, n, K), floats_at(w.d, n, K // 16))


def tile(s):
    """acc = fma(float(dot), d * a_scale, acc), for the first and then for the last 16 of a block of activations."""
    b, codes_bytes, d_bytes = s.b, part_bytes(PANEL, "codes"), part_bytes(PANEL, "d")

    def block(i, acc):
        start, which = b.mul(b.lshr(i, s.int(1)), s.int(PANEL.itemsize)), b.and_(i, s.int(1))
        codes = b.add(b.add(start, b.mul(which, s.int(codes_bytes))), s.int(offset(PANEL, "codes")))
        first = b.add(start, b.mul(which, s.int(2 * d_bytes)))
        [pairs] = s.unpack(i, entries_at(s, codes, TWICE_E2M1))
        for half, dots in enumerate(half_dots(s, i, each(pairs))):
            acc = scale_add(s, acc, dots, _scales(s, b.add(first, s.int(d_bytes * half))), i)
        return acc

    return s.blocks(32, block, PANEL.itemsize // 2)


def _scales(s, start):
    """The float32 of each feature at `start` in the panels, for every column."""
    places = [moved(s.b, moved(s.b, w, start), 4 * first) for w, first in zip(s.w, s.first, strict=True)]
    return [read(s.b, place, s.floats, 4 * s.lanes) for place in places]


PACKED = Packed(PANEL, SIZE, arrange)
PRODUCT = Product("sixteens", QUANTIZED, ("codes", "d"), row_dot)


# ---------------------------------------------------------------- tables of embeddings


@definition
def entry_of(row_B, at, j):
    """Twice the float of weight j of a block whose codes begin at byte `at`."""
    return np.float32(TWICE_E2M1[nibble(row_B, at + 8 * (j // 16) + j % 8, j % 16 // 8)])


@inlined
def store_entries(codes, d, scale, out):
    """Stores 16 weights times scale; codes: the address of their 8 bytes."""
    for j in range(8):
        pair = np.int64(peek(codes + j, uint8))
        poke(out + 4 * j, np.float32(TWICE_E2M1[pair & 15]) * d * scale)
        poke(out + 32 + 4 * j, np.float32(TWICE_E2M1[pair >> 4]) * d * scale)
