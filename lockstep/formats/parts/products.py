"""Definitions of the product of a prepared row of activations with a row of a weight, which several formats share.

Each product is one chain of operations over K, in ascending order and never split.
"""

from typing import Any, NamedTuple

import numpy as np

from lockstep.formats.parts.rows import PLAIN, QUANTIZED, RowFormat
from lockstep.native.kernel import definition, inlined
from lockstep.native.machine import byte_array, float_array
from lockstep.native.numbers import carray
from lockstep.native.simd import fma

ZERO, ONE_128TH = np.float32(0), np.float32(1 / 128)


class Product(NamedTuple):
    """How weights are multiplied with activations.

    name: of the definitions' kernels. rows: how the activations are prepared. arrays: fields of
    `operands.WeightArrays`, in the order of a format's `unpack`. dot: (x, weight, n, K) to the product with row n of
    the weight, where x is what rows.read returns.
    """

    name: str
    rows: RowFormat
    arrays: tuple[str, ...]
    dot: Any


@inlined
def floats_at(address, n, num_values):
    """Row n of a float32 array with num_values values in a row."""
    return carray(float_array(address + 4 * num_values * n), (num_values,))


@inlined
def codes_at(address, n, num_values):
    """Row n of an int8 array with num_values values in a row."""
    return carray(byte_array(address + num_values * n), (num_values,))


# ---------------------------------------------------------------- numbers


@definition
def dot_f32(x_K, w_K):
    """sum of x[k] * w[k]: acc = fma(x[k], w[k], acc) for k ascending from +0."""
    acc = ZERO
    for k in range(x_K.size):
        acc = fma(x_K[k], w_K[k], acc)
    return acc


@inlined
def row_dot_f32(x, w, n, K):
    return dot_f32(x, floats_at(w.codes, n, K))


# ---------------------------------------------------------------- codes, and a scale for 32 of them


@definition
def dot_q8(a_K, a_scale, w_K, w_scale):
    """sum over blocks of 32 of (integer dot) * scales, for signed codes of up to 8 bits.

    Order: acc = fma(float(dot of the block), w_scale * a_scale, acc), blocks ascending from +0; the dot is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot = 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(w_K[k])
        acc = fma(np.float32(dot), w_scale[b] * a_scale[b], acc)
    return acc


@inlined
def row_dot_q8(x, w, n, K):
    return dot_q8(x[0], x[1], codes_at(w.codes, n, K), floats_at(w.d, n, K // 32))


# ---------------------------------------------------------------- codes, and a scale and a minimum for 32 of them


@definition
def dot_q4_1(a_K, a_scale, codes_K, d, m):
    """sum of a_scale * a[k] * (d * code[k] + m), with a_scale, d and m for 32 weights.

    Order, for each block of 32, ascending from acc = +0, dots exact:
      acc = fma(float(dot), d * a_scale, acc)
      acc = fma(m * (-1 / 128), float(-128 * sum of a) * a_scale, acc), where dividing by 128 is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot, total = 0, 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(codes_K[k])
            total += np.int64(a_K[k])
        acc = fma(np.float32(dot), d[b] * a_scale[b], acc)
        acc = fma(m[b] * -ONE_128TH, np.float32(-128 * total) * a_scale[b], acc)
    return acc


@inlined
def row_dot_q4_1(x, w, n, K):
    d, m = floats_at(w.d, n, K // 32), floats_at(w.m, n, K // 32)
    return dot_q4_1(x[0], x[1], codes_at(w.codes, n, K), d, m)


FLOATS = Product("f32", PLAIN, ("codes",), row_dot_f32)
CODES = Product("q8", QUANTIZED, ("codes", "d"), row_dot_q8)
CODES_AND_MINIMA = Product("q4_1", QUANTIZED, ("codes", "d", "m"), row_dot_q4_1)
