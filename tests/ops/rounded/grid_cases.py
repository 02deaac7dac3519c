"""Grids for tests, as rows of a Setting."""

import numpy as np

from lockstep.ops.rounded import grids
from lockstep.ops.rounded.grids import GRID_WORDS, SMALL_FLOATS


def integer(scale, zero, low, high):
    inverse = np.float32(1) / np.float32(scale)
    return row(grids.INTEGER, scale, inverse, zero, low, high)


def row(*words):
    made = np.zeros(GRID_WORDS, np.float32)
    made[: len(words)] = words
    return made


def floats(kind, name, scale=1.0):
    mantissa, emin, emax, largest = SMALL_FLOATS[name]
    return row(kind, scale, np.float32(1) / np.float32(scale), mantissa, emin, emax, largest)


GRIDS = {
    "off": row(grids.OFF),
    "i8": integer(0.03, 0, -128, 127),
    "u4": integer(0.4, 7, 0, 15),
    "u3": integer(0.5, 1, 0, 7),
    "i16": integer(2e-4, 0, -32768, 32767),
    "i8/row": row(grids.ROW_SYMMETRIC, 0, 0, 0, -128, 127),
    "u8/row": row(grids.ROW_ASYMMETRIC, 0, 0, 0, 0, 255),
    "e4m3": floats(grids.FLOAT, "e4m3", 0.02),
    "e5m2": floats(grids.FLOAT, "e5m2", 0.5),
    "mxint8": floats(grids.MICROSCALED, "int8"),
    "mxfp8": floats(grids.MICROSCALED, "e4m3"),
    "mxfp8_e5m2": floats(grids.MICROSCALED, "e5m2"),
    "mxfp4": floats(grids.MICROSCALED, "e2m1"),
    "nvfp4": row(grids.NVFP4, 0.003, np.float32(1) / np.float32(0.003)),
    "q8": row(grids.Q8),
}
