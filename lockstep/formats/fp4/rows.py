"""Floats of 4 bits with a scale for every 16 and a factor for all of a tensor, as rows of the format for them."""

import numpy as np

from lockstep.formats.format import Format
from lockstep.formats.fp4.nvfp4_scaled import NVFP4_SCALED, stored_rows

FORMAT: Format = NVFP4_SCALED
GROUP = 16  # weights that share a scale


def rows_of_scales(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Rows as stored, uint8 [rows, bytes], of codes uint8 [rows, K] and float32 scales [rows, K / 16]."""
    return stored_rows(codes, scales * np.float32(0.5))
