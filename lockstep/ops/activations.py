"""What a linear layer makes of its input rows before it multiplies: the definitions.

Weights of 4 to 8 bits multiply int8 activations with one float32 scale per block of 32; bf16 weights multiply
activations rounded to bf16. Both are done per row, never per batch.

A row of quantized activations is K / 32 blocks of 44 bytes, so that a kernel needs one pointer a row:
    32 int8 codes | float32 scale | int32 bias | int16 sum of the first 16 codes | int16 sum of the last 16
where bias = -128 * (sum of the block's codes) is what weights stored as code + 128 add too much, and the half sums
serve formats with a scale for every 16 weights (q6_k).
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, float32, int32

from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import definition, inlined, variant
from lockstep.runtime.machine import byte_array, float_array
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import DTYPES, Tensor
from lockstep.runtime.simd import absolute, bf16_bits, maximum, peek, poke, rint, round_bf16, to_i32, where_below
from lockstep.runtime.step import num_rows
from lockstep.runtime.targets import bf16_dot

BLOCK, BLOCK_BYTES = 32, 44
SCALE, BIAS, SUMS = 32, 36, 40  # bytes into a block
NATIVE_BF16 = bf16_dot()
BF16_BYTES = 2 if NATIVE_BF16 else 4  # elsewhere the same values as float32
ZERO, ONE_127TH, HIGHEST, INFINITY = np.float32(0), np.float32(1 / 127), np.float32(127), np.float32(np.inf)
PUT = ROW_BYTES = None  # of a variant: what writes a prepared row, and its bytes
SMALLEST = np.float32(1e-30)  # a block whose largest value is below this is taken as zero: 127 / amax must stay finite


@inlined
def f32_bytes(num_values):
    """Bytes of a row as it is."""
    return 4 * num_values


@inlined
def q8_bytes(num_values):
    """Bytes of a row of quantized activations."""
    return num_values // BLOCK * BLOCK_BYTES


@inlined
def bf16_bytes(num_values):
    """Bytes of a row rounded to bf16."""
    return BF16_BYTES * num_values


class RowFormat(NamedTuple):
    """How prepared rows lie in memory. num_bytes: of a row of so many values. dtype: of tensors of such rows."""

    name: str
    dtype: str
    num_bytes: Any

    def width(self, num_values: int) -> int:
        """Elements of a tensor's row that holds so many values."""
        return self.num_bytes.py_func(num_values) // DTYPES[self.dtype].itemsize


# by the kind of op that prepares rows; "" stands for rows as they are
ROW_FORMATS = {
    "": RowFormat("f32", "f32", f32_bytes),
    "quantize_q8": RowFormat("q8", "i8", q8_bytes),
    "round_bf16": RowFormat("bf16", "i8", bf16_bytes),
}


def check_rows(op: Operands, name: str, preparation: str, num_values: int, count: int = 1) -> None:
    """ValueError if an op's operand is not `count` rows, side by side, of so many values, prepared by a kind of op."""
    tensor, declared = getattr(op, name), type(op).__name__
    if preparation not in ROW_FORMATS:
        known = ", ".join(map(repr, ROW_FORMATS))
        raise ValueError(f"{declared}: preparation is {preparation!r}, expected one of {known}")
    dtype, width = ROW_FORMATS[preparation].dtype, count * ROW_FORMATS[preparation].width(num_values)
    if (tensor.dtype, tensor.width) != (dtype, width):
        raise ValueError(f"{declared}: {name} is {tensor}, expected {dtype}[{tensor.rows}, {width}]")


class Preparation(Operands):
    """out = the rows of x [rows, width] as linear layers of some formats multiply them."""

    group = "linear"
    out: Tensor = output(dtype=None)
    x: Tensor = rows("width")
    width: int

    def check(self):
        check_rows(self, "out", self.kind, self.width)


class QuantizeQ8(Preparation):
    """out = x as blocks of int8 codes with a scale each."""


class RoundBf16(Preparation):
    """out = x rounded to bf16."""


class Preparable(Operands):
    """An op that makes rows of `width` values, which can end with their preparation.

    preparation: the kind of op that it ends with; "" leaves out float32.
    """

    out: Tensor = output(dtype=None)
    width: int
    preparation: str = ""

    @property
    def own_kind(self):
        """Its kind without a preparation."""
        return self.name()

    @property
    def kind(self):
        return f"{self.own_kind}+{self.preparation}" if self.preparation else self.own_kind

    def check(self):
        check_rows(self, "out", self.preparation, self.width)


@inlined
def magnitude(x):
    """The absolute value; infinity for NaN."""
    return where_below(absolute(x), INFINITY, absolute(x), INFINITY)


@definition
def quantize_block(x, codes):
    """Quantizes 32 float32 to int8 codes; returns the scale and the sums of the first and the last 16 codes.

    Error: half a code, amax / 254. Order: amax exactly; scale = amax * (1 / 127); inverse = 127 / amax;
      code = rint(x * inverse), ties to even; blocks with amax < 1e-30 are all zero. A block with a NaN or an infinity
      has codes of zero and an infinite scale, so that what is multiplied with it is NaN.
    """
    amax = ZERO
    for i in range(BLOCK):
        amax = maximum(magnitude(x[i]), amax)
    if amax == INFINITY:
        codes[:] = np.int8(0)
        return INFINITY, 0, 0
    if amax < SMALLEST:
        codes[:] = np.int8(0)
        return ZERO, 0, 0
    inverse, first, last = HIGHEST / amax, 0, 0
    for i in range(BLOCK):
        code = to_i32(rint(x[i] * inverse))
        codes[i] = np.int8(code)
        if i < BLOCK // 2:
            first += code
        else:
            last += code
    return amax * ONE_127TH, first, last


@definition
def quantize_row(x_K, out):
    """Writes a row of quantized activations at an address, block by block."""
    for b in range(x_K.size // BLOCK):
        place = out + BLOCK_BYTES * b
        scale, first, last = quantize_block(x_K[BLOCK * b : BLOCK * b + BLOCK], carray(byte_array(place), (BLOCK,)))
        poke(place + SCALE, float32(scale))
        poke(place + BIAS, int32(-128 * (first + last)))
        poke(place + SUMS, int32(last * 65536 + (first & 65535)))


@definition
def round_row(x_K, out):
    """Writes a row rounded to bf16 at an address."""
    for k in range(x_K.size):
        if NATIVE_BF16:
            poke(out + 2 * k, bf16_bits(round_bf16(x_K[k])))
        else:
            poke(out + 4 * k, round_bf16(x_K[k]))


@definition
def quantized_row(row, K):
    """Codes and scales of the quantized row at an address."""
    codes, scales = np.empty(K, np.int8), np.empty(K // BLOCK, np.float32)
    for b in range(K // BLOCK):
        place = row + BLOCK_BYTES * b
        codes[BLOCK * b : BLOCK * b + BLOCK] = carray(byte_array(place), (BLOCK,))
        scales[b] = peek(place + SCALE, float32)
    return codes, scales


def _prepare(op, step, thread, num_threads):
    a = Preparation.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        PUT(carray(float_array(a.x + 4 * a.width * t), (a.width,)), a.out + ROW_BYTES(a.width) * t)


_quantize = variant(_prepare, "_quantize", PUT=quantize_row, ROW_BYTES=q8_bytes)
_round = variant(_prepare, "_round", PUT=round_row, ROW_BYTES=bf16_bytes)
REFERENCE = {"quantize_q8": Implementation(_quantize), "round_bf16": Implementation(_round)}
