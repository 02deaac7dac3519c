"""Checking a stored matrix for NaN and infinity without decoding it, by the exponents of its floats or block scales."""

from collections.abc import Iterator

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
# The layouts of tables of embeddings, which stay in the checkpoint's file as long as it cannot change: mapped under a
# lease. Where there is no lease, a copy is kept like packed weights (`store.py`). Tables of the second layout are so
# large that they are not checked for NaN and infinity, which would read all of them.
STORED_BYTES, MAPPED_BYTES = "stored bytes", "mapped stored bytes"


def finite_bytes(tensor: StoredTensor) -> np.ndarray:
    """A copy of a matrix as stored, uint8 [rows, bytes per row].

    Raises ValueError that names the tensor and the first NaN or infinity ([row, column], or [row, block] of a scale),
    or the file if it was truncated. Error: none.
    """
    copy = np.empty((tensor.shape[0], tensor.data.nbytes // tensor.shape[0]), np.uint8)
    for start, piece in _checked_pieces(tensor):
        copy[start : start + len(piece)] = piece.reshape(len(piece), -1).view(np.uint8)
    return copy


def check_matrix(tensor: StoredTensor) -> None:
    """Raises what `finite_bytes` raises, without a copy."""
    for _ in _checked_pieces(tensor):
        pass


def _checked_pieces(tensor: StoredTensor) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, a copy of some rows as stored), ... of all rows, each piece once it was checked."""
    step = max(1, PIECE_BYTES // (tensor.data.nbytes // tensor.shape[0]))
    for start in range(0, tensor.shape[0], step):
        piece = tensor.read(slice(start, start + step))
        _check(tensor, piece, start)
        yield start, piece


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
