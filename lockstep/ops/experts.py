"""The linear layers of a mixture of experts: the definitions.

A token's top_k experts make X pairs (token, rank). `group_experts` of `ops/moe.py` puts them in order of expert, and
the ops here work on that order, T X rows in all, so that an expert's rows lie together and its weights are read once:

    ExpertRows      row s = the prepared input of the token that pair order[s] belongs to
    ExpertLinear    out[s] = x[s] W[e]^T, where e is the expert of row s
    ExpertGated     row s = silu(gate) * up, prepared
    ExpertScatter   y[order[s]] = x[s], back to the order of pairs

Prepared means: as it is for f32 and f16 weights, rounded for bf16, quantized for the others (`ops/activations.py`).
Every output element is what `ops/linear.py` defines for that row and weight, whichever rows share the expert.
"""

import numpy as np
from numba import carray, float32, int32

from lockstep.ops.activations import NATIVE_BF16, bf16_width, q8_width, quantize_row, quantized_row, row_bytes
from lockstep.ops.linear import (
    bf16_rows,
    dot_bf16,
    dot_f32,
    dot_q4_1,
    dot_q4_k,
    dot_q8,
    f32_rows,
    q4_0_rows,
    q4_1_rows,
    q5_0_rows,
    q5_1_rows,
    q5_k_rows,
    q8_0_rows,
)
from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.kernel import definition, inlined, kernel, variant
from lockstep.runtime.machine import byte_array, float_array
from lockstep.runtime.operands import Operands, output, packed, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.simd import bf16_bits, bf16_f32, peek, poke, round_bf16
from lockstep.runtime.step import num_rows

# how rows are prepared: the type of the tensor that holds them, and its elements for a row of so many numbers
PREPARED = {"f32": ("f32", lambda width: width), "bf16": ("i8", bf16_width), "q8": ("i8", q8_width)}
PUT = ROW_BYTES = ACTIVATION = DOT = None  # constants of the variants below


def preparation(format):
    """How experts' weights in a format want their rows: a key of PREPARED."""
    return {"f32": "f32", "f16": "f32", "bf16": "bf16"}.get(format, "q8")


def _check_prepared(op):
    """ValueError unless the op's output holds top_k prepared rows."""
    name = type(op).__name__
    if op.prepared not in PREPARED:
        raise ValueError(f"{name}: prepared is {op.prepared!r}, expected one of {', '.join(PREPARED)}")
    dtype, width = PREPARED[op.prepared]
    if (op.out.dtype, op.out.width) != (dtype, op.top_k * width(op.width)):
        raise ValueError(f"{name}: out is {op.out}, expected {dtype} and {op.top_k * width(op.width)} wide")


class ExpertRows(Operands):
    """Row s of out: the row of x that pair order[s] belongs to, prepared for a format of weights."""

    out: Tensor = output(dtype=None)
    x: Tensor = rows("width")
    order: Tensor = rows("top_k", dtype="i32")
    width: int
    top_k: int
    prepared: str
    check = _check_prepared

    @property
    def kind(self):
        return f"expert_rows_{self.prepared}"


class ExpertLinear(Operands):
    """out[s] = x[s] W[e]^T; the rows of expert e are those from expert_start[e] on, its weights e * features and on."""

    out: Tensor = output("top_k * features")
    x: Tensor = rows(dtype=None)
    expert_start: Tensor = rows("num_experts + 1", dtype="i32")
    weight: Weight = packed("num_experts * features, width")
    width: int
    features: int
    num_experts: int
    top_k: int

    def check(self):
        dtype, width = PREPARED[preparation(self.weight.format)]
        if (self.x.dtype, self.x.width) != (dtype, self.top_k * width(self.width)):
            raise ValueError(f"ExpertLinear: x is {self.x}, expected rows prepared for {self.weight.format}")

    @property
    def kind(self):
        return f"expert_linear_{self.weight.format}"

    def flops(self, context):
        return 2 * self.top_k * self.width * self.features


class ExpertGated(Operands):
    """Row s of out: silu(gate) * up, prepared for a format of weights; row s of x: gate [width], up [width]."""

    out: Tensor = output(dtype=None)
    x: Tensor = rows("2 * top_k * width")
    width: int
    top_k: int
    prepared: str
    check = _check_prepared

    @property
    def kind(self):
        return f"expert_gated_{self.prepared}"


class ExpertScatter(Operands):
    """out[order[s]] = x[s]."""

    out: Tensor = output("top_k * width")
    x: Tensor = rows("top_k * width")
    order: Tensor = rows("top_k", dtype="i32")
    width: int
    top_k: int


@inlined
def pair_at(order, s):
    """The pair in row s: token * top_k + rank."""
    return np.int64(peek(order + 4 * s, int32))


@inlined
def f32_bytes(width):
    return 4 * width


@inlined
def bf16_bytes(width):
    return (2 if NATIVE_BF16 else 4) * width


@definition
def put_f32(x_K, out):
    """A row as it is."""
    for k in range(x_K.size):
        poke(out + 4 * k, x_K[k])


@definition
def put_bf16(x_K, out):
    """A row rounded to bf16."""
    for k in range(x_K.size):
        if NATIVE_BF16:
            poke(out + 2 * k, bf16_bits(round_bf16(x_K[k])))
        else:
            poke(out + 4 * k, round_bf16(x_K[k]))


@inlined
def _floats(address, count):
    return carray(float_array(address), (count,))


@inlined
def _codes(w, n, K):
    return carray(byte_array(w.codes + K * n), (K,))


def _rows(op, step, thread, num_threads):
    a = ExpertRows.read(op)
    for s in range(num_rows(op, step) * a.top_k if thread == 0 else 0):
        t = pair_at(a.order, s) // a.top_k
        PUT(_floats(a.x + 4 * a.width * t, a.width), a.out + ROW_BYTES(a.width) * s)


def _gated(op, step, thread, num_threads):
    a = ExpertGated.read(op)
    K, row_K = a.width, np.empty(a.width, np.float32)
    for s in range(num_rows(op, step) * a.top_k if thread == 0 else 0):
        x = _floats(a.x + 8 * K * s, 2 * K)
        for k in range(K):
            row_K[k] = silu(x[k]) * x[K + k]
        PUT(row_K, a.out + ROW_BYTES(K) * s)


@kernel
def _scatter(op, step, thread, num_threads):
    a = ExpertScatter.read(op)
    for s in range(num_rows(op, step) * a.top_k if thread == 0 else 0):
        put_f32(_floats(a.x + 4 * a.width * s, a.width), a.out + 4 * a.width * pair_at(a.order, s))


@definition
def _activation_f32(x, s, K):
    """Row s of x, as `DOT` takes it."""
    return _floats(x + 4 * K * s, K)


@definition
def _activation_bf16(x, s, K):
    row_K, x = np.empty(K, np.float32), x + bf16_bytes(K) * s
    for k in range(K):
        row_K[k] = bf16_f32(peek(x + 2 * k, int32)) if NATIVE_BF16 else peek(x + 4 * k, float32)
    return row_K


@definition
def _activation_q8(x, s, K):
    return quantized_row(x + row_bytes(K) * s, K)


@inlined
def _dot_f32(x, w, n, K):
    """The product of a row and row n of the weights."""
    return dot_f32(x, _floats(w.codes + 4 * K * n, K))


@inlined
def _dot_bf16(x, w, n, K):
    return dot_bf16(x, _floats(w.codes + 4 * K * n, K))


@inlined
def _dot_q8(x, w, n, K):
    return dot_q8(x[0], x[1], _codes(w, n, K), _floats(w.d + K // 8 * n, K // 32))


@inlined
def _dot_q4_1(x, w, n, K):
    d, m = _floats(w.d + K // 8 * n, K // 32), _floats(w.m + K // 8 * n, K // 32)
    return dot_q4_1(x[0], x[1], _codes(w, n, K), d, m)


@inlined
def _dot_q4_k(x, w, n, K):
    d, dmin = _floats(w.d + K // 64 * n, K // 256), _floats(w.dmin + K // 64 * n, K // 256)
    sc, m = _floats(w.sc + K // 8 * n, K // 32), _floats(w.m + K // 8 * n, K // 32)
    return dot_q4_k(x[0], x[1], _codes(w, n, K), d, dmin, sc, m)


def _linear(op, step, thread, num_threads):
    a = ExpertLinear.read(op)
    K, N = a.width, a.features
    for e in range(a.num_experts if thread == 0 else 0):
        for s in range(pair_at(a.expert_start, e), pair_at(a.expert_start, e + 1)):
            x = ACTIVATION(a.x, s, K)
            for n in range(N):
                poke(a.out + 4 * (N * s + n), DOT(x, a.weight, e * N + n, K))


PUTS = {
    "f32": dict(PUT=put_f32, ROW_BYTES=f32_bytes),
    "bf16": dict(PUT=put_bf16, ROW_BYTES=bf16_bytes),
    "q8": dict(PUT=quantize_row, ROW_BYTES=row_bytes),
}
PRODUCTS = {
    "f32": dict(ACTIVATION=_activation_f32, DOT=_dot_f32),
    "bf16": dict(ACTIVATION=_activation_bf16, DOT=_dot_bf16),
    "q8": dict(ACTIVATION=_activation_q8, DOT=_dot_q8),
    "q4_1": dict(ACTIVATION=_activation_q8, DOT=_dot_q4_1),
    "q4_k": dict(ACTIVATION=_activation_q8, DOT=_dot_q4_k),
}
FORMATS = {  # which product, and the layout of its weights
    "f32": ("f32", Layout("f32 rows", f32_rows)),
    "f16": ("f32", Layout("f32 rows", f32_rows)),
    "bf16": ("bf16", Layout("bf16 rows", bf16_rows)),
    "q8_0": ("q8", Layout("q8_0 rows", q8_0_rows, ("codes", "d"))),
    "q4_0": ("q8", Layout("q4_0 rows", q4_0_rows, ("codes", "d"))),
    "q4_1": ("q4_1", Layout("q4_1 rows", q4_1_rows, ("codes", "d", "m"))),
    "q5_0": ("q8", Layout("q5_0 rows", q5_0_rows, ("codes", "d"))),
    "q5_1": ("q4_1", Layout("q5_1 rows", q5_1_rows, ("codes", "d", "m"))),
    "q5_k": ("q4_k", Layout("q5_k rows", q5_k_rows, ("codes", "d", "dmin", "sc", "m"))),
}
for _name, _constants in PUTS.items():
    globals()[f"_rows_{_name}"] = variant(_rows, f"_rows_{_name}", **_constants)
    globals()[f"_gated_{_name}"] = variant(_gated, f"_gated_{_name}", **_constants)
for _name, _constants in PRODUCTS.items():
    globals()[f"_linear_{_name}"] = variant(_linear, f"_linear_{_name}", **_constants)
REFERENCE = {
    "expert_scatter": Implementation(_scatter),
    **{f"expert_rows_{name}": Implementation(globals()[f"_rows_{name}"]) for name in PUTS},
    **{f"expert_gated_{name}": Implementation(globals()[f"_gated_{name}"]) for name in PUTS},
    **{f"expert_linear_{f}": Implementation(globals()[f"_linear_{p}"], layout) for f, (p, layout) in FORMATS.items()},
}
