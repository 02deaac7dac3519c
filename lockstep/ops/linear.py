"""Linear layers, out = x W^T (+ residual): the definitions, one for each weight format.

Every output element is one chain of operations over K, in ascending order and never split: it does not depend on how
many rows or features are computed with it. Weights and activations are prepared by `ops/activations.py`.
"""

from typing import ClassVar

import numpy as np
from numba import carray, float32, int32

from lockstep.formats.pack import floats, q4_0_fields, q8_0_fields
from lockstep.formats.pack_k import q4_k_fields, q5_k_fields, q6_k_fields
from lockstep.formats.pack_q5 import q4_1_fields, q5_0_fields, q5_1_fields
from lockstep.formats.panels import padded_width
from lockstep.ops.activations import NATIVE_BF16, bf16_bytes, check_rows, f32_bytes, q8_bytes, quantized_row
from lockstep.ops.share import contiguous
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.kernel import definition, inlined, variant
from lockstep.runtime.machine import byte_array, float_array
from lockstep.runtime.operands import Operands, output, packed, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.simd import bf16_f32, fma, peek, poke
from lockstep.runtime.step import num_rows
from lockstep.weights.tensor import BLOCK_FORMATS

ZERO, ONE_128TH = np.float32(0), np.float32(1 / 128)
SMALLEST_NORMAL = np.float32(2.0**-126)
FLUSH_BELOW = 2.0**-126 - 2.0**-151
ROW_BYTES = READ = DOT = None  # of a variant: of rows of x, what reads one, and its dot with a row of the weight
# the kind of op that prepares rows for weights of a format; "" if they are multiplied as they are
PREPARATION = {
    "f32": "",
    "f16": "",
    "bf16": "round_bf16",
    "q8_0": "quantize_q8",
    "q4_0": "quantize_q8",
    "q4_1": "quantize_q8",
    "q5_0": "quantize_q8",
    "q5_1": "quantize_q8",
    "q4_k": "quantize_q8",
    "q5_k": "quantize_q8",
    "q6_k": "quantize_q8",
}


class Linear(Operands):
    """out = x W^T (+ residual) in columns column .. column + out_features; W [out_features, in_features].

    out, residual [rows, width]. format: "" as recorded, where x is float32 [rows, in_features]; once lowered, that of
    the weight, for which x is prepared. Kernels write whole panels: zeros (+ residual) up to a multiple of 16 columns.
    """

    group = "linear"
    multiplied: ClassVar[dict[str, str]] = {"x": "weight"}  # rows, and what they are prepared for
    out: Tensor = output("width")
    x: Tensor = rows(dtype=None)
    weight: Weight = packed("out_features, in_features")
    residual: Tensor | None = rows("width", optional=True)
    in_features: int
    out_features: int
    width: int
    column: int
    format: str = ""

    @property
    def kind(self):
        return f"{self.name()}_{self.format}" if self.format else self.name()

    @property
    def row_values(self):
        """How many values a row of x has."""
        return self.in_features

    def flops(self, context):
        return 2 * self.in_features * self.out_features

    def check(self):
        name = type(self).__name__
        if self.format not in ("", self.weight.format):
            raise ValueError(f"{name}: format is {self.format!r}, expected that of the weight, {self.weight.format!r}")
        check_rows(self, "x", PREPARATION[self.format] if self.format else "", self.row_values)
        block = BLOCK_FORMATS[self.weight.format].BLOCK_SIZE if self.weight.format in BLOCK_FORMATS else 1
        if not 0 < self.in_features or self.in_features % block:
            raise ValueError(f"{name}: in_features is {self.in_features}, expected a positive multiple of {block}")
        if self.column % 16 or self.column + padded_width(self.out_features) > self.width:
            raise ValueError(
                f"{name}: {self.out_features} features from column {self.column} on do not fit a row of {self.width} "
                f"in whole panels of 16"
            )


@definition
def dot_f32(x_K, w_K):
    """sum of x[k] * w[k]: acc = fma(x[k], w[k], acc) for k ascending from +0."""
    acc = ZERO
    for k in range(x_K.size):
        acc = fma(x_K[k], w_K[k], acc)
    return acc


@inlined
def daz(x):
    """Denormals are zero, of the same sign."""
    return x * ZERO if abs(x) < SMALLEST_NORMAL else x


@inlined
def flushed_fma(x, w, acc):
    """fma(daz x, daz w, daz acc), then zero iff the exact result is below 2**-126 - 2**-151 in magnitude.

    The product of two bf16 is exact in float64, and the sum exact enough near the bound to tell the side.
    """
    x, w, acc = daz(x), daz(w), daz(acc)
    result, exact = fma(x, w, acc), np.float64(x) * np.float64(w) + np.float64(acc)
    if exact != 0 and abs(exact) < FLUSH_BELOW:
        return ZERO if exact > 0 else -ZERO
    return result


@definition
def dot_bf16(x_K, w_K):
    """sum of x[k] * w[k] for bf16 values held as float32, in pairs, the odd one first.

    Order: acc = f(x[2i], w[2i], f(x[2i+1], w[2i+1], acc)) with f = `flushed_fma`, i ascending from acc = +0: what
      VDPBF16PS does. Source: Intel SDM; 0 mismatches in 96 million lanes on a Zen 5.
    """
    acc = ZERO
    for i in range(0, x_K.size, 2):
        acc = flushed_fma(x_K[i], w_K[i], flushed_fma(x_K[i + 1], w_K[i + 1], acc))
    return acc


@definition
def dot_q8(a_K, a_scale, w_K, w_scale):
    """sum over blocks of 32 of (integer dot) * scales, for signed codes of 4, 5 or 8 bits.

    Order: acc = fma(float(dot of the block), w_scale * a_scale, acc), blocks ascending from +0; the dot is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot = 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(w_K[k])
        acc = fma(np.float32(dot), w_scale[b] * a_scale[b], acc)
    return acc


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


@definition
def dot_q4_k(a_K, a_scale, codes_K, d, dmin, sc, m):
    """sum of a_scale * a[k] * (d * sc * code[k] - dmin * m), with d, dmin for 256 weights and a_scale, sc, m for 32.

    Codes of 4 or 5 bits; d * sc and dmin * m are exact.

    Order, for each block of 32, ascending from acc = +0, dots exact:
      acc = fma(float(dot), (d * sc) * a_scale, acc)
      acc = fma((dmin * m) / 128, float(-128 * sum of a) * a_scale, acc), where dividing by 128 is exact.
    """
    acc = ZERO
    for b in range(a_scale.size):
        dot, total = 0, 0
        for k in range(32 * b, 32 * b + 32):
            dot += np.int64(a_K[k]) * np.int64(codes_K[k])
            total += np.int64(a_K[k])
        acc = fma(np.float32(dot), (d[b // 8] * sc[b]) * a_scale[b], acc)
        acc = fma((dmin[b // 8] * m[b]) * ONE_128TH, np.float32(-128 * total) * a_scale[b], acc)
    return acc


@definition
def dot_q6_k(a_K, a_scale, codes_K, sc, d):
    """sum of a_scale * a[k] * d * sc * code[k], with d for 256 weights, a_scale for 32 and the integer sc for 16.

    Order: acc = fma(float(sc0 * dot0 + sc1 * dot1), d * a_scale, acc) for each block of 32, ascending from +0; the
      integers, dots of the block's first and last 16, are exact and below 2**24.
    """
    acc = ZERO
    for b in range(a_scale.size):
        total = 0
        for k in range(32 * b, 32 * b + 32):
            total += np.int64(sc[k // 16]) * np.int64(a_K[k]) * np.int64(codes_K[k])
        acc = fma(np.float32(total), d[b // 8] * a_scale[b], acc)
    return acc


@inlined
def floats_at(address, n, count):
    """Row n of a float32 array with so many values in a row."""
    return carray(float_array(address + 4 * count * n), (count,))


@inlined
def codes_at(address, n, count):
    """Row n of an int8 array."""
    return carray(byte_array(address + count * n), (count,))


# What a prepared row at an address is to a dot: its values, or the codes and scales of a quantized one.


@definition
def plain_row(row, K):
    return carray(float_array(row), (K,))


@definition
def rounded_row(row, K):
    row_K = np.empty(K, np.float32)
    for k in range(K):
        row_K[k] = bf16_f32(peek(row + 2 * k, int32)) if NATIVE_BF16 else peek(row + 4 * k, float32)
    return row_K


# Dots of such a row with row n of a weight, by its arrays.


@inlined
def row_dot_f32(x, w, n, K):
    return dot_f32(x, floats_at(w.codes, n, K))


@inlined
def row_dot_bf16(x, w, n, K):
    return dot_bf16(x, floats_at(w.codes, n, K))


@inlined
def row_dot_q8(x, w, n, K):
    return dot_q8(x[0], x[1], codes_at(w.codes, n, K), floats_at(w.d, n, K // 32))


@inlined
def row_dot_q4_1(x, w, n, K):
    d, m = floats_at(w.d, n, K // 32), floats_at(w.m, n, K // 32)
    return dot_q4_1(x[0], x[1], codes_at(w.codes, n, K), d, m)


@inlined
def row_dot_q4_k(x, w, n, K):
    d, dmin = floats_at(w.d, n, K // 256), floats_at(w.dmin, n, K // 256)
    sc, m = floats_at(w.sc, n, K // 32), floats_at(w.m, n, K // 32)
    return dot_q4_k(x[0], x[1], codes_at(w.codes, n, K), d, dmin, sc, m)


@inlined
def row_dot_q6_k(x, w, n, K):
    sc, d = codes_at(w.sc, n, K // 16), floats_at(w.d, n, K // 256)
    return dot_q6_k(x[0], x[1], codes_at(w.codes, n, K), sc, d)


@inlined
def finish(a, t, n, value):
    """Adds the residual, if the layer has one, and stores feature n of row t."""
    place = 4 * (a.width * t + a.column + n)
    poke(a.out + place, float32(peek(a.residual + place, float32) + value if a.residual else value))


def _linear(op, step, thread, num_threads):
    """Row by row, each thread a contiguous share of the features; those up to whole panels are zeros."""
    a = Linear.read(op)
    for t in range(num_rows(op, step)):
        x = READ(a.x + ROW_BYTES(a.in_features) * t, a.in_features)
        for n in contiguous((a.out_features + 15) // 16 * 16, thread, num_threads):
            finish(a, t, n, DOT(x, a.weight, n, a.in_features))


def _rows(weight, fields):
    """The fields of all rows of a weight, piece after piece, and of zeros up to whole panels as in `formats.pack`."""
    pieces = [fields(part, slice(None)) for part in weight.parts]
    joined = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return tuple(np.pad(a, ((0, padded_width(len(a)) - len(a)), (0, 0))) for a in joined)


def f32_rows(weight):
    """float32 [N, K]."""
    return _rows(weight, lambda part, rows: (floats(part, rows),))


def bf16_rows(weight):
    """Values rounded to bf16, as float32 [N, K]."""
    import ml_dtypes

    return _rows(weight, lambda part, rows: (floats(part, rows).astype(ml_dtypes.bfloat16).astype(np.float32),))


def q8_0_rows(weight):
    """Codes int8 [N, K] and scales float32 [N, K / 32]."""
    codes, scales = _rows(weight, q8_0_fields)
    return codes, scales.astype(np.float32)


def q4_0_rows(weight):
    """Codes -8..7 as int8 [N, K] and scales float32 [N, K / 32]."""
    codes, scales = _rows(weight, q4_0_fields)
    return codes.astype(np.int8) - np.int8(8), scales.astype(np.float32)


def q5_0_rows(weight):
    """Codes -16..15 as int8 [N, K] and scales float32 [N, K / 32]."""
    codes, scales = _rows(weight, q5_0_fields)
    return codes.astype(np.int8) - np.int8(16), scales.astype(np.float32)


def _as_floats(fields):
    """Codes as int8, everything else as float32."""
    codes, *rest = fields
    return codes.astype(np.int8), *[a.astype(np.float32) for a in rest]


def q4_1_rows(weight):
    """Codes 0..15 as int8 [N, K]; d, m float32 [N, K / 32]."""
    return _as_floats(_rows(weight, q4_1_fields))


def q5_1_rows(weight):
    """Codes 0..31 as int8 [N, K]; d, m float32 [N, K / 32]."""
    return _as_floats(_rows(weight, q5_1_fields))


def q4_k_rows(weight):
    """Codes 0..15 as int8 [N, K]; d, dmin float32 [N, K / 256]; sc, m as float32 [N, K / 32]."""
    return _as_floats(_rows(weight, q4_k_fields))


def q5_k_rows(weight):
    """The same with codes 0..31."""
    return _as_floats(_rows(weight, q5_k_fields))


def q6_k_rows(weight):
    """Codes -32..31 int8 [N, K], sc int8 [N, K / 16], d float32 [N, K / 256]."""
    codes, sc, d = _rows(weight, q6_k_fields)
    return codes, sc, d.astype(np.float32)


PRODUCTS = {  # how layers are defined
    "f32": dict(READ=plain_row, ROW_BYTES=f32_bytes, DOT=row_dot_f32),
    "bf16": dict(READ=rounded_row, ROW_BYTES=bf16_bytes, DOT=row_dot_bf16),
    "q8": dict(READ=quantized_row, ROW_BYTES=q8_bytes, DOT=row_dot_q8),
    "q4_1": dict(READ=quantized_row, ROW_BYTES=q8_bytes, DOT=row_dot_q4_1),
    "q4_k": dict(READ=quantized_row, ROW_BYTES=q8_bytes, DOT=row_dot_q4_k),
    "q6_k": dict(READ=quantized_row, ROW_BYTES=q8_bytes, DOT=row_dot_q6_k),
}
FORMATS = {  # which product, and the layout of its weights
    "f32": ("f32", Layout("f32 rows", f32_rows)),
    "f16": ("f32", Layout("f32 rows", f32_rows)),
    "bf16": ("bf16", Layout("bf16 rows", bf16_rows)),
    "q8_0": ("q8", Layout("q8_0 rows", q8_0_rows, ("codes", "d"))),
    "q4_0": ("q8", Layout("q4_0 rows", q4_0_rows, ("codes", "d"))),
    "q5_0": ("q8", Layout("q5_0 rows", q5_0_rows, ("codes", "d"))),
    "q4_1": ("q4_1", Layout("q4_1 rows", q4_1_rows, ("codes", "d", "m"))),
    "q5_1": ("q4_1", Layout("q5_1 rows", q5_1_rows, ("codes", "d", "m"))),
    "q4_k": ("q4_k", Layout("q4_k rows", q4_k_rows, ("codes", "d", "dmin", "sc", "m"))),
    "q5_k": ("q4_k", Layout("q5_k rows", q5_k_rows, ("codes", "d", "dmin", "sc", "m"))),
    "q6_k": ("q6_k", Layout("q6_k rows", q6_k_rows, ("codes", "sc", "d"))),
}
for _name, _constants in PRODUCTS.items():
    globals()[f"_linear_{_name}"] = variant(_linear, f"_linear_{_name}", **_constants)
REFERENCE = {
    f"linear_{format}": Implementation(globals()[f"_linear_{product}"], layout)
    for format, (product, layout) in FORMATS.items()
}
