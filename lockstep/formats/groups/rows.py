"""Integer weights in groups, w = d * q + m, as rows of the format that has room for them."""

import numpy as np

from lockstep.formats.format import Format
from lockstep.formats.groups import channel8, group4, group8
from lockstep.formats.parts.groups import repeated

SMALLEST_GROUP = group8.SIZE  # of weights; a group is a multiple of it
BY_CHANNEL = channel8.CHANNEL8  # of signed codes of 8 bits with one scale, and no zero point, for a row
rows_by_channel = channel8.stored_rows


def format_of(bits: int, group: int) -> Format:
    """The format of codes of `bits` bits with a scale for `group` weights. ValueError if there is none."""
    if group < 1 or group % SMALLEST_GROUP or not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits in groups of {group} are not supported, only up to 8 bits in groups of "
                         f"a multiple of {SMALLEST_GROUP}")  # fmt: skip
    return group4.GROUP4 if bits <= 4 and group % group4.SIZE == 0 else group8.GROUP8


def stored_rows(format: Format, codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Rows as stored, uint8 [rows, bytes], of codes uint8 [rows, K] and float32 d and m [rows, groups]."""
    times = codes.shape[1] // format.block_size // d.shape[1]
    make = group4.stored_rows if format is group4.GROUP4 else group8.stored_rows
    return make(codes, repeated(d, times), repeated(m, times))
