"""Checking a stored matrix for NaN and infinity without decoding it, by the exponents of its floats or block scales."""

import numpy as np

from lockstep.formats import BLOCK_FORMATS
from lockstep.formats.parts import e4m3, powers
from lockstep.formats.parts.blocks import as_blocks
from lockstep.formats.parts.finite import check_finite
from lockstep.weights.tensor import StoredTensor

# By format: without the sign, a float whose bits are at least this number is infinite or NaN.
INFINITY = {"f32": (np.uint32, 0x7F800000), "f16": (np.uint16, 0x7C00), "bf16": (np.uint16, 0x7F80)}
FLOATS = {np.dtype(np.float16): "f16", np.dtype(np.float32): "f32"}
CHECKED = {powers.E8M0: powers.checked_halves, e4m3.E4M3: e4m3.checked_halves}  # small scales
PIECE_BYTES = 4 << 20
# The layout of tables that are so large that they stay in the checkpoint's file, as long as it cannot change: mapped
# under a lease. Where there is no lease, they are kept like other tables (`store.py`).
MAPPED_BYTES = "mapped stored bytes"


def finite_bytes(tensor: StoredTensor) -> np.ndarray:
    """A copy of a matrix as stored, uint8 [rows, bytes per row].

    Raises ValueError that names the tensor and the first NaN or infinity ([row, column], or [row, block] of a scale),
    or the file if it was truncated. Error: none.
    """
    num_rows = tensor.shape[0]
    row_bytes = tensor.data.nbytes // num_rows
    copy = np.empty((num_rows, row_bytes), np.uint8)
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, num_rows, step):
        piece = tensor.read(slice(start, start + step))
        _check(tensor, piece, start)
        copy[start : start + step] = piece.reshape(len(piece), -1).view(np.uint8)
    return copy


def _check(tensor: StoredTensor, piece: np.ndarray, first_row: int) -> None:
    if tensor.format not in BLOCK_FORMATS:
        _check_floats(tensor, piece, tensor.format, first_row, "weights")
        return
    blocks = as_blocks(piece, BLOCK_FORMATS[tensor.format].stored.block)
    for name in blocks.dtype.names or ():
        kind = blocks.dtype[name].base
        if kind in FLOATS:
            _check_floats(tensor, np.ascontiguousarray(blocks[name]), FLOATS[kind], first_row, "block scales")
        if kind in CHECKED:
            check_finite(tensor, CHECKED[kind](blocks[name]), first_row, "block scales")


def _check_floats(tensor: StoredTensor, values: np.ndarray, format: str, first_row: int, what: str) -> None:
    unsigned, infinity = INFINITY[format]
    # A shift drops the sign.
    if (values.view(unsigned) << unsigned(1)).max(initial=0) >= 2 * infinity:
        check_finite(tensor, values.astype(np.float32), first_row, what)
