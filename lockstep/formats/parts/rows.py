"""Prepared rows of activations: float32 as they are, rounded to bf16, or quantized to int8.

The ops that prepare them are in `ops/elementwise/activations.py`; this file says how prepared rows lie in memory, and
how a definition reads them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lockstep.formats.parts.layout import offsets
from lockstep.native.kernel import definition, inlined
from lockstep.native.machine import byte_array, float_array
from lockstep.native.numbers import carray, float32, int32
from lockstep.native.simd import bf16_f32, peek
from lockstep.native.targets import TARGET
from lockstep.runtime.program import DTYPES

# 32 quantized activations: bias = -128 * (sum of the codes) corrects for weights that are stored as code + 128, and
# scaled_bias = float(bias) * scale is what minima are multiplied with; sums of the first and the last 16 codes serve
# formats with a scale for every 16 weights
QUANTIZED_BLOCK = np.dtype(
    [("codes", "i1", 32), ("scale", "<f4"), ("bias", "<i4"), ("scaled_bias", "<f4"), ("sums", "<i2", 2)]
)
BLOCK, BLOCK_BYTES = 32, QUANTIZED_BLOCK.itemsize
CODES, SCALE, BIAS, SCALED_BIAS, SUMS = offsets(QUANTIZED_BLOCK)
NATIVE_BF16 = TARGET.bf16_dot is not None
BF16_BYTES = 2 if NATIVE_BF16 else 4  # without VDPBF16PS the same values as float32


@inlined
def f32_bytes(num_values):
    """Bytes of a row of float32."""
    return 4 * num_values


@inlined
def q8_bytes(num_values):
    """Bytes of a row of quantized activations."""
    return num_values // BLOCK * BLOCK_BYTES


@inlined
def bf16_bytes(num_values):
    """Bytes of a row rounded to bf16."""
    return BF16_BYTES * num_values


@definition
def plain_row(row, K):
    """The values of the row at an address."""
    return carray(float_array(row), (K,))


@definition
def rounded_row(row, K):
    """The values of the rounded row at an address, as float32."""
    row_K = np.empty(K, np.float32)
    for k in range(K):
        row_K[k] = bf16_f32(peek(row + 2 * k, int32)) if NATIVE_BF16 else peek(row + 4 * k, float32)
    return row_K


@definition
def quantized_row(row, K):
    """Codes and scales of the quantized row at an address."""
    codes, scales = np.empty(K, np.int8), np.empty(K // BLOCK, np.float32)
    for b in range(K // BLOCK):
        block = row + BLOCK_BYTES * b
        codes[BLOCK * b : BLOCK * b + BLOCK] = carray(byte_array(block), (BLOCK,))
        scales[b] = peek(block + SCALE, float32)
    return codes, scales


class RowFormat(NamedTuple):
    """How prepared rows lie in memory.

    preparation: the kind of op that prepares them; "" for float32 as it is. dtype: of tensors of prepared rows.
    num_bytes: (number of values, a multiple of `block`) to the bytes of a row. read: (address of a row, K) to what a
    definition multiplies.
    """

    name: str
    preparation: str
    dtype: str
    block: int
    num_bytes: Any
    read: Callable[..., Any]

    def width(self, num_values: int) -> int:
        """Elements of a row of a tensor that holds num_values prepared values."""
        return self.num_bytes.py_func(num_values) // DTYPES[self.dtype].itemsize


PLAIN = RowFormat("f32", "", "f32", 1, f32_bytes, plain_row)
ROUNDED = RowFormat("bf16", "round_bf16", "i8", 32, bf16_bytes, rounded_row)
QUANTIZED = RowFormat("q8", "quantize_q8", "i8", BLOCK, q8_bytes, quantized_row)
ROW_FORMATS = {rows.preparation: rows for rows in (PLAIN, QUANTIZED, ROUNDED)}  # by the kind of op that prepares them
