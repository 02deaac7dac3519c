"""Preparation of the input rows of linear layers (int8 codes, or bf16): the definitions.

Weights of 4 to 8 bits multiply int8 activations with one float32 scale per block of 32; bf16 weights multiply
activations rounded to bf16. Both are done per row, never per batch.

How prepared rows lie in memory is in `formats/parts/rows.py`: a row of quantized activations is one run of blocks, so
that a kernel needs one pointer a row.
"""

import numpy as np

from lockstep.formats.parts.rows import (
    BIAS,
    BLOCK,
    BLOCK_BYTES,
    NATIVE_BF16,
    ROW_FORMATS,
    SCALE,
    SCALED_BIAS,
    SUMS,
    bf16_bytes,
    q8_bytes,
)
from lockstep.native.kernel import definition, inlined, variant
from lockstep.native.machine import byte_array, float_array
from lockstep.native.numbers import carray, float32, int32
from lockstep.native.simd import absolute, bf16_bits, maximum, poke, rint, round_bf16, to_i32, where_below
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, rows
from lockstep.runtime.program import Tensor
from lockstep.runtime.step import num_rows

ZERO, ONE_127TH, HIGHEST, INFINITY = np.float32(0), np.float32(1 / 127), np.float32(127), np.float32(np.inf)
PUT = ROW_BYTES = None  # constants of a variant: functions that write a prepared row, and count its bytes
SMALLEST = np.float32(1e-30)  # a block whose largest value is below this is taken as zero: 127 / amax must stay finite


def check_rows(op: Operands, name: str, preparation: str, num_values: int, num_parts: int = 1) -> None:
    """ValueError unless rows of an op's operand are num_parts rows of num_values values side by side, each prepared.

    preparation: the kind of op that prepares them, "" for float32.
    """
    tensor, declared = getattr(op, name), type(op).__name__
    if preparation not in ROW_FORMATS:
        known = ", ".join(map(repr, ROW_FORMATS))
        raise ValueError(f"{declared}: preparation is {preparation!r}, expected one of {known}")
    if num_values % (block := ROW_FORMATS[preparation].block):  # kernels write whole blocks
        raise ValueError(f"{declared}: {name} has rows of {num_values} values, expected a multiple of {block}")
    dtype, width = ROW_FORMATS[preparation].dtype, num_parts * ROW_FORMATS[preparation].width(num_values)
    if (tensor.dtype, tensor.width) != (dtype, width):
        raise ValueError(f"{declared}: {name} is {tensor}, expected {dtype}[{tensor.rows}, {width}]")


class Preparation(Operands):
    """out = the rows of x [rows, width] in the form that linear layers of some weight formats multiply."""

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
    """An op that makes rows of `width` values and may prepare them for linear layers in the same pass.

    preparation: the kind of op that prepares them; "" leaves them float32.
    """

    out: Tensor = output(dtype=None)
    width: int
    preparation: str = ""

    @property
    def own_kind(self):
        """The kind of the op without a preparation."""
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


@inlined
def finite(x):
    """x, or zero for NaN and infinities."""
    return where_below(absolute(x), INFINITY, x, ZERO)


@definition
def quantize_block(x, codes):
    """Quantizes 32 float32 to int8 codes; returns the scale and the sums of the first and the last 16 codes.

    Error: half a code, amax / 254. Order: amax exactly; scale = amax * (1 / 127); inverse = 127 / amax;
      code = rint(x * inverse), ties to even; blocks with amax < 1e-30 are all zero. A block with a NaN or an infinity
      has codes of zero and an infinite scale, so that every product with it is NaN.
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
        bias = int32(-128 * (first + last))
        poke(place + BIAS, bias)
        poke(place + SCALED_BIAS, float32(float32(bias) * scale))
        poke(place + SUMS, int32(last * 65536 + (first & 65535)))


@definition
def round_row(x_K, out):
    """Writes a row rounded to bf16 at an address."""
    for k in range(x_K.size):
        if NATIVE_BF16:
            poke(out + 2 * k, bf16_bits(round_bf16(x_K[k])))
        else:
            poke(out + 4 * k, round_bf16(x_K[k]))


def _prepare(op, step, thread, num_threads):
    a = Preparation.read(op)
    for t in range(num_rows(op, step) if thread == 0 else 0):
        PUT(carray(float_array(a.x + 4 * a.width * t), (a.width,)), a.out + ROW_BYTES(a.width) * t)


_quantize = variant(_prepare, "_quantize", PUT=quantize_row, ROW_BYTES=q8_bytes)
_round = variant(_prepare, "_round", PUT=round_row, ROW_BYTES=bf16_bytes)
REFERENCE = {"quantize_q8": Implementation(_quantize), "round_bf16": Implementation(_round)}
