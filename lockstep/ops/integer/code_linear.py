"""Linear layers in integer arithmetic, as accelerators do them: the definition.

    out = float32(float64(acc) * (float64(s_x) * float64(s_w[n]))) (+ residual)
    acc = sum over k of (c_x[k] - z_x) (c_w[n, k] - z_w[n]), exactly

x holds codes of a grid (`ops/integer/code_rows.py`), with a scale and a zero point for each row; the weight holds codes
of at most 8 bits, with a scale and a zero point for each output row (`ops/integer/code_weights.py`). Sums of integers
have no order.
"""

import numpy as np

from lockstep.formats.parts.panels import padded_width
from lockstep.formats.parts.products import codes_at, floats_at
from lockstep.native.kernel import definition, kernel
from lockstep.native.machine import byte_array
from lockstep.native.numbers import carray, int32, int64
from lockstep.native.simd import peek
from lockstep.ops.integer.code_rows import check_codes, code_bytes, plane_bytes, tail_of
from lockstep.ops.integer.code_weights import FORMAT, ROWS
from lockstep.ops.linear.linear import finish
from lockstep.ops.share import contiguous
from lockstep.runtime.backend import Implementation
from lockstep.runtime.operands import Operands, output, packed, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows

MOST_VALUES = 32768  # of a row: 255 * 255 * 32768 < 2**31, so int32 holds the sums of a plane, zero points included


class CodeLinear(Operands):
    """out = x W^T (+ residual) in columns column .. column + out_features; W [out_features, in_features] of codes.

    out, residual [rows, width]. x: rows of codes of in_features values, all of the same grid. Kernels write
    whole panels: zeros (+ residual) up to a multiple of 16 columns.
    """

    group = "linear"
    rules = (f"0 < in_features <= {MOST_VALUES}", "column % 16 == 0")
    out: Tensor = output("width")
    x: Tensor = rows(dtype="i8")
    weight: Weight = packed("out_features, in_features")
    residual: Tensor | None = rows("width", optional=True)
    in_features: int
    out_features: int
    width: int
    column: int

    def flops(self, context):
        return 2 * self.in_features * self.out_features

    def check(self):
        check_codes(self, "x", self.in_features)
        if self.weight.format != FORMAT:
            raise ValueError(f"CodeLinear: weight {self.weight.name} is {self.weight.format}, expected {FORMAT}")
        if self.column + padded_width(self.out_features) > self.width:
            raise ValueError(
                f"CodeLinear: {self.out_features} features from column {self.column} on do not fit a row of "
                f"{self.width} in whole panels of 16"
            )


@definition
def centered_row(row, K):
    """c_x - z_x, int64 [K], of the row of codes at an address."""
    plane = plane_bytes(K)
    first, second = carray(byte_array(row), (plane,)), carray(byte_array(row + plane), (plane,))
    _, zero, planes = tail_of(row, K)
    row_K = np.empty(K, np.int64)
    for k in range(K):
        row_K[k] = first[k] - zero if planes == 1 else 256 * np.int64(first[k]) + second[k] - zero
    return row_K


@definition
def code_dot(x_K, w_K, zero):
    """acc: the sum of x[k] * (w[k] - zero), in int64.

    Shapes: x [K] int64; w [K] int8.
    Error: none: products are below 2**24, sums below 2**39.
    Order: none.
    """
    acc = 0
    for k in range(x_K.size):
        acc += x_K[k] * (np.int64(w_K[k]) - zero)
    return acc


@definition
def scaled(acc, x_scale, w_scale):
    """The value of an integer sum: float32(float64(acc) * (float64(x_scale) * float64(w_scale))).

    Error: the product of scales is exact; acc times it is rounded to float64, then to float32.
    """
    return np.float32(np.float64(acc) * (np.float64(x_scale) * np.float64(w_scale)))


@kernel
def _run(op, step, thread, num_threads):
    """Row by row, each thread a contiguous share of the features, which are zero past the last up to whole panels."""
    a = CodeLinear.read(op)
    K = a.in_features
    for t in range(num_rows(op, step)):
        row = a.x + code_bytes(K) * t
        x, scale = centered_row(row, K), tail_of(row, K)[0]
        for n in contiguous((a.out_features + 15) // 16 * 16, thread, num_threads):
            acc = code_dot(x, codes_at(a.weight.codes, n, K), int64(peek(a.weight.m + 4 * n, int32)))
            finish(a, t, n, scaled(acc, scale, floats_at(a.weight.d, n, 1)[0]))


REFERENCE = {"code_linear": Implementation(_run, ROWS)}
