"""Panels of sixteen output features: what the arrays of packed weights are made of, K in the order of the reduction.

A format's structured dtype says what a panel holds for the weights of a block. The functions below arrange values
[panels, 16, K] for a field of it.
"""

from collections.abc import Callable

import numpy as np

from lockstep.native.targets import TARGET

Arrange = Callable[[np.ndarray], np.ndarray]
Destination = tuple[np.ndarray, Arrange]  # an array [panels, ...], and how [panels, 16, ...] is arranged for it
Placed = dict[str, tuple[Arrange, np.ndarray]]  # {path of a field of a panel: (its arrangement, values of rows)}
PANEL = 16


def num_panels(num_features: int) -> int:
    """Panels of a packed weight: an even number."""
    return -(-num_features // (2 * PANEL)) * 2


def padded_width(num_features: int) -> int:
    """Columns of a linear layer's output: features rounded up to whole panels."""
    return -(-num_features // PANEL) * PANEL


def k_major(values: np.ndarray) -> np.ndarray:
    """[panels, 16, K] to [panels, K, 16]."""
    return values.transpose(0, 2, 1)


def grouped(size: int) -> Arrange:
    """[panels, 16, K] to [panels, K / size, 16, size]."""
    return lambda v: v.reshape(v.shape[0], PANEL, -1, size).transpose(0, 2, 1, 3)


def in_fours(values: np.ndarray) -> np.ndarray:
    """Codes [panels, 16, K] to [panels, K / 4, 16, 4], in the target's order of features and K."""
    return grouped(4)(TARGET.in_order(values))


def target_bytes(codes: np.ndarray) -> np.ndarray:
    """Codes int8 as bytes: plus 128 where the target's dot takes unsigned weights."""
    return codes.view(np.uint8) ^ np.uint8(128 if TARGET.unsigned else 0)


def nibble_pairs(values: np.ndarray) -> np.ndarray:
    """Codes [panels, 16, K] to bytes [panels, K / 8, 16, 4]; this and the following in the target's order."""
    grouped = TARGET.in_order(values).reshape(values.shape[0], PANEL, -1, 2, 4).transpose(0, 2, 1, 3, 4)
    return grouped[..., 0, :] | (grouped[..., 1, :] << 4)


def fifth_bits(values: np.ndarray) -> np.ndarray:
    """Bits 0 or 1 [panels, 16, K] to bytes [panels, K / 32, 16, 4]: bit g of byte j belongs to k = 4 g + j."""
    eight = TARGET.in_order(values).reshape(values.shape[0], PANEL, -1, 8, 4)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(eight.astype(np.uint8) << shifts, axis=3).transpose(0, 2, 1, 3)


def bit_pairs(values: np.ndarray) -> np.ndarray:
    """Codes 0..3 [panels, 16, K] to bytes [panels, K / 16, 16, 4]: bits 2 g, 2 g + 1 of byte j are of k = 4 g + j."""
    four = TARGET.in_order(values).reshape(values.shape[0], PANEL, -1, 4, 4).transpose(0, 2, 1, 3, 4)
    return four[..., 0, :] | four[..., 1, :] << 2 | four[..., 2, :] << 4 | four[..., 3, :] << 6
