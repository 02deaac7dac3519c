"""Numba's number types and arrays at addresses, as kernels and definitions name them.

Other folders import these names from here, not from Numba.
"""

import llvmlite
import numba
from numba import float32, int8, int32, int64, types, uint8, uint16
from numba.np.numpy_support import carray

__all__ = ["carray", "float32", "int8", "int32", "int64", "types", "uint8", "uint16", "versions"]


def versions() -> dict[str, str]:
    """The versions of the compilers, by name."""
    return dict(numba=numba.__version__, llvmlite=llvmlite.__version__)
