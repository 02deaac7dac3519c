"""What all block formats share: a row of K weights is K / size blocks, each one element of a structured dtype."""

import math
from collections.abc import Callable

import numpy as np

# Large enough for NumPy to be efficient, small enough to stay in a few MB.
CHUNK_WEIGHTS = 1 << 18


def row_bytes(columns: int, size: int, block: np.dtype) -> int:
    """Bytes of one row of `columns` weights; raises ValueError unless blocks of `size` fill the row exactly."""
    if columns % size:
        raise ValueError(f"a row of {columns} weights is not a whole number of blocks of {size}")
    return columns // size * block.itemsize


def joined(fields: np.ndarray) -> np.ndarray:
    """Per-block fields [..., blocks, n] as per-row fields [..., blocks * n]."""
    return fields.reshape(*fields.shape[:-2], fields.shape[-2] * fields.shape[-1])


def as_blocks(packed: np.ndarray, block: np.dtype) -> np.ndarray:
    """View packed rows uint8 [..., bytes] as blocks [..., blocks].

    Raises ValueError if the dtype is not uint8 or the last axis is not a whole number of blocks.
    """
    if packed.dtype != np.uint8:
        raise ValueError(f"packed blocks must be uint8, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] % block.itemsize:
        raise ValueError(f"packed rows of shape {packed.shape} are not whole blocks of {block.itemsize} bytes")
    return np.ascontiguousarray(packed).view(block)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles of the last axis, then its high nibbles: uint8 [..., n] to uint8 [..., 2 n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def scaled(codes: np.ndarray, scale: np.ndarray, zero: int = 0) -> np.ndarray:
    """scale * (codes - zero) in float32, for codes [blocks, size] and scales [blocks]."""
    return (codes.astype(np.float32) - np.float32(zero)) * scale.astype(np.float32)[:, None]


def in_chunks(
    blocks: np.ndarray,
    size: int,
    convert: Callable[[np.ndarray], np.ndarray],
    dtype: np.dtype,
    shape: tuple[int, ...] = (),
) -> np.ndarray:
    """convert(blocks) for blocks of `size` weights [num, ...], a few rows' worth at a time.

    dtype, shape: of the result for one block.
    """
    result = np.empty((len(blocks), *shape), dtype)
    step = CHUNK_WEIGHTS // size
    for start in range(0, len(blocks), step):
        result[start : start + step] = convert(blocks[start : start + step])
    return result


def decoded(packed: np.ndarray, size: int, block: np.dtype, decode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Packed rows uint8 [..., bytes] as float32 [..., K]; decode: blocks [num] to float32 [num, size]."""
    blocks = as_blocks(packed, block)
    # A damaged file may hold infinite scales: check_finite names them, NumPy's warnings would not.
    with np.errstate(invalid="ignore", over="ignore"):
        values = in_chunks(blocks.reshape(-1), size, decode, np.dtype(np.float32), (size,))
    return values.reshape(*blocks.shape[:-1], blocks.shape[-1] * size)


def encoded(weights: np.ndarray, size: int, block: np.dtype, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Weights [..., K] as packed rows uint8 [..., bytes]; encode: float32 [num, size] to blocks [num].

    ValueError unless K is whole blocks.
    """
    if weights.ndim == 0 or weights.shape[-1] % size:
        raise ValueError(f"weights of shape {weights.shape} are not whole blocks of {size}")
    num_blocks = math.prod(weights.shape[:-1]) * (weights.shape[-1] // size)
    values = weights.astype(np.float32, copy=False).reshape(num_blocks, size)
    blocks = in_chunks(values, size, encode, block)
    return blocks.view(np.uint8).reshape(*weights.shape[:-1], row_bytes(weights.shape[-1], size, block))


def round_half_away(values: np.ndarray) -> np.ndarray:
    """C's roundf: to the nearest integer, halves away from zero (NumPy's rint rounds halves to even)."""
    whole = np.trunc(values)
    return whole + np.where(np.abs(values - whole) >= 0.5, np.copysign(np.float32(1), values), np.float32(0))


def inverse_or_zero(scale: np.ndarray) -> np.ndarray:
    """1 / scale in float32, and 0 where that is infinite: such a scale is 0 as a float16 too."""
    tiny = np.abs(scale) < np.float32(2.0**-126)
    return np.where(tiny, np.float32(0), np.float32(1) / np.where(tiny, np.float32(1), scale))


def scale_to_f16(scale: np.ndarray) -> np.ndarray:
    """Round block scales to little-endian float16; raises ValueError if one is too large for it."""
    with np.errstate(over="ignore"):
        rounded = scale.astype("<f2")
    if not np.isfinite(rounded).all():
        largest = np.abs(scale).max()
        raise ValueError(f"block scale {largest} does not fit float16: the weights are too large for this format")
    return rounded
