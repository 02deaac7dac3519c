"""What all block formats share: a row of K weights is K / block_size blocks of block_bytes bytes each."""

import math
from collections.abc import Callable

import numpy as np

# Large enough for NumPy to be efficient, small enough to stay in a few MB.
CHUNK_WEIGHTS = 1 << 18


def row_bytes(columns: int, block_size: int, block_bytes: int) -> int:
    """Bytes of one row of `columns` weights; raises ValueError unless blocks fill the row exactly."""
    if columns % block_size:
        raise ValueError(f"a row of {columns} weights is not a whole number of blocks of {block_size}")
    return columns // block_size * block_bytes


def joined(fields: np.ndarray) -> np.ndarray:
    """Per-block fields [..., blocks, n] as per-row fields [..., blocks * n]."""
    return fields.reshape(*fields.shape[:-2], fields.shape[-2] * fields.shape[-1])


def as_blocks(packed: np.ndarray, block_bytes: int) -> np.ndarray:
    """View packed rows uint8 [..., bytes] as uint8 [..., blocks, block_bytes].

    Raises ValueError if the dtype is not uint8 or the last axis is not a whole number of blocks.
    """
    if packed.dtype != np.uint8:
        raise ValueError(f"packed blocks must be uint8, got {packed.dtype}")
    if packed.ndim == 0 or packed.shape[-1] % block_bytes:
        raise ValueError(f"packed rows of shape {packed.shape} are not whole blocks of {block_bytes} bytes")
    return packed.reshape(*packed.shape[:-1], packed.shape[-1] // block_bytes, block_bytes)


def field_f16(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The little-endian float16 stored at byte `offset` of each block: [..., blocks]."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0]


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles of the last axis, then its high nibbles: uint8 [..., n] to uint8 [..., 2 n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def scaled(codes: np.ndarray, scale: np.ndarray, zero: int = 0) -> np.ndarray:
    """scale * (codes - zero) in float32, for codes [blocks, block_size] and float16 scales [blocks, 1]."""
    return (codes.astype(np.float32) - np.float32(zero)) * scale.astype(np.float32)


def dequantize_in_chunks(
    packed: np.ndarray, block_size: int, block_bytes: int, decode: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Decode packed rows uint8 [..., bytes] to float32 [..., K], a few rows' worth of blocks at a time.

    `decode` maps uint8 [blocks, block_bytes] to float32 [blocks, block_size].
    """
    # A damaged file may hold infinite scales: check_finite names them, NumPy's warnings would not.
    with np.errstate(invalid="ignore", over="ignore"):
        return _in_chunks(as_blocks(packed, block_bytes), block_size, block_size, np.float32, decode)


def _in_chunks(
    blocks: np.ndarray, block_size: int, width: int, dtype: type, convert: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Blocks of block_size weights [..., blocks, n], each converted to `width` values: dtype [..., blocks * width]."""
    flat = blocks.reshape(math.prod(blocks.shape[:-1]), blocks.shape[-1])
    made = np.empty((len(flat), width), dtype)
    step = CHUNK_WEIGHTS // block_size
    for start in range(0, len(flat), step):
        made[start : start + step] = convert(flat[start : start + step])
    return joined(made.reshape(*blocks.shape[:-1], width))


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


def quantize_in_chunks(
    weights: np.ndarray, block_size: int, block_bytes: int, encode: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Encode weights [..., K] to packed rows uint8 [..., bytes], a few rows' worth of blocks at a time.

    `encode` maps float32 [blocks, block_size] to uint8 [blocks, block_bytes]. ValueError unless K is whole blocks.
    """
    if weights.ndim == 0 or weights.shape[-1] % block_size:
        raise ValueError(f"weights of shape {weights.shape} are not whole blocks of {block_size}")
    shape = (*weights.shape[:-1], weights.shape[-1] // block_size, block_size)
    blocks = weights.astype(np.float32, copy=False).reshape(shape)
    return _in_chunks(blocks, block_size, block_bytes, np.uint8, encode)
