"""Weights d * q + m, with float32 d and m for a group of them: what integer weights of Hugging Face folders become.

A block holds one d and one m, and so does a part of a panel; a group of several blocks repeats them.
"""

import numpy as np

from lockstep.formats.parts.panels import PANEL, Placed, k_major
from lockstep.formats.parts.products import ONE_128TH
from lockstep.formats.parts.scalars import single
from lockstep.native.emit import moved, read
from lockstep.native.kernel import definition, inlined
from lockstep.native.numbers import float32
from lockstep.native.simd import peek, store, to_f32

HEAD = [("d", "<f4"), ("m", "<f4")]  # of a block as stored
PANEL_HEAD = [("d", "<f4", PANEL), ("m", "<f4", PANEL)]
D, M, CODES = 0, 4, 8


def decoded(codes: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """d * q + m of blocks [num], for codes [num, size]. Error: one rounding of the product, if d has more than 16 bits,
    and one of the addition."""
    return codes.astype(np.float32) * blocks["d"][:, None] + blocks["m"][:, None]


def repeated(values: np.ndarray, times: int) -> np.ndarray:
    """Each value of the last axis `times` times."""
    return np.repeat(values, times, axis=-1) if times > 1 else values


def placed(d: np.ndarray, m: np.ndarray) -> Placed:
    """The scales in a panel: d, and m * (-1 / 128), which products begin with."""
    return {"d": (k_major, d), "m": (k_major, m * -ONE_128TH)}


def floats(s, start, begin):
    """A float32 of each feature, `start + begin` bytes into the panels, for every column."""
    places = [moved(s.b, moved(s.b, w, start), begin + 4 * first) for w, first in zip(s.w, s.first, strict=True)]
    return [read(s.b, place, s.floats, 4 * s.lanes) for place in places]


@definition
def affine(row_B, block, code):
    """d * code + m, for the block at a byte of a row."""
    return single(row_B, block + D) * np.float32(code) + single(row_B, block + M)


@inlined
def store_affine(codes, block, scale, out):
    """d * code + m, times scale, for sixteen codes of the block at an address."""
    store(out, (to_f32(codes) * peek(block + D, float32) + peek(block + M, float32)) * scale)


def block_rows(block: np.dtype, codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Rows as stored, uint8 [rows, bytes], of packed codes [rows, blocks, bytes] and float32 d, m [rows, blocks]."""
    rows = np.empty(d.shape, block)
    rows["codes"], rows["d"], rows["m"] = codes, d, m
    return rows.view(np.uint8).reshape(len(rows), -1)
