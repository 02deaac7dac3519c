"""The linear layers of a mixture of experts: the definitions.

A token's top_k experts make X pairs (token, rank). `group_experts` of `ops/linear/moe.py` puts the pairs in order of
expert, and the ops here work on rows in that order, T X rows in all, so that an expert's rows lie together and its
weights are read once:

    ExpertRows      row s = the prepared input of the token that pair order[s] belongs to
    ExpertLinear    out[s] = x[s] W[e]^T (+ bias[e]), where e is the expert of row s
    ExpertBias      out[s] = x[s] + bias[e], which `fuse` of `ops/rewrite.py` joins with the op before it
    ExpertGated     row s = activation(gate) * up, prepared
    ExpertScatter   y[order[s]] = x[s], back to the order of pairs

Prepared means: unchanged for f32 and f16 weights, rounded for bf16, quantized for the other formats
(`ops/elementwise/activations.py`). Every output element is what `ops/linear/linear.py` defines for that row and weight,
whichever other rows the expert has.
"""

import numpy as np

from lockstep.formats import FORMATS
from lockstep.formats.parts.panels import PANEL
from lockstep.formats.parts.rows import ROW_FORMATS, plain_row
from lockstep.native.kernel import definition, kernel, variant
from lockstep.native.numbers import float32
from lockstep.native.simd import peek, poke
from lockstep.ops.elementwise.activations import check_rows, quantize_row, round_row
from lockstep.ops.elementwise.gated_mul import check_gate
from lockstep.ops.elementwise.gates import GATES
from lockstep.ops.linear.linear import LAYOUTS, PREPARATION, PRODUCTS, constants
from lockstep.ops.linear.moe import place_at
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.operands import Operands, constant, output, packed, rows
from lockstep.runtime.program import Tensor, Weight
from lockstep.runtime.step import num_rows

PUT = ROW_BYTES = READ = DOT = GATE = None  # constants of the variants below: how rows are stored, read, multiplied


class ExpertPreparation(Operands):
    """An op that makes top_k rows of `width` values for each row of the step, prepared for weights of a format."""

    out: Tensor = output(dtype=None)
    width: int
    top_k: int
    preparation: str

    def check(self):
        check_rows(self, "out", self.preparation, self.width, self.top_k)

    @property
    def kind(self):
        return f"{self.name()}_{ROW_FORMATS[self.preparation].name}"


class ExpertRows(ExpertPreparation):
    """Row s of out: the row of x that pair order[s] belongs to."""

    x: Tensor = rows("width")
    order: Tensor = rows("top_k", dtype="i32")


class ExpertLinear(Operands):
    """out[s] = x[s] W[e]^T (+ bias[e]). The rows of expert e begin at expert_start[e], its rows of the weight at
    e * features."""

    out: Tensor = output("top_k * features")
    x: Tensor = rows(dtype=None)
    expert_start: Tensor = rows("num_experts + 1", dtype="i32")
    weight: Weight = packed("num_experts * features, width")
    bias: Weight | None = constant("num_experts, features", optional=True)
    width: int
    features: int
    num_experts: int
    top_k: int

    def check(self):
        check_rows(self, "x", PREPARATION[self.weight.format], self.width, self.top_k)
        if self.features % (2 * PANEL):  # kernels take two panels; behind the last expert's are none
            raise ValueError(f"ExpertLinear: features is {self.features}, expected a multiple of {2 * PANEL}")

    @property
    def part_start(self):
        return self.expert_start

    @property
    def kind(self):
        return f"expert_linear_{self.weight.format}"

    def flops(self, context):
        return 2 * self.top_k * self.width * self.features


class ExpertBias(Operands):
    """out[s] = x[s] + bias[e], with the expert e of the pair order[s]."""

    in_place = True
    out: Tensor = output("top_k * width")
    x: Tensor = rows("top_k * width")
    order: Tensor = rows("top_k", dtype="i32")
    expert_ids: Tensor = rows("top_k", dtype="i32")
    bias: Weight = constant("num_experts, width")
    width: int
    num_experts: int
    top_k: int

    def flops(self, context):
        return self.top_k * self.width


class ExpertGated(ExpertPreparation):
    """Row s of out: activation(gate) * up; row s of x: gate [width], up [width]. activation: one of `gates.GATES`."""

    x: Tensor = rows("2 * top_k * width")
    activation: str

    def check(self):
        check_gate(self)
        super().check()

    @property
    def kind(self):
        return gated_kind(self.activation, ROW_FORMATS[self.preparation].name)


def gated_kind(activation: str, rows: str) -> str:
    """The kind of an ExpertGated, by the format of the rows that the op makes."""
    return f"expert_gated_{rows}" if activation == "silu" else f"expert_{activation}_gated_{rows}"


class ExpertScatter(Operands):
    """out[order[s]] = x[s]."""

    out: Tensor = output("top_k * width")
    x: Tensor = rows("top_k * width")
    order: Tensor = rows("top_k", dtype="i32")
    width: int
    top_k: int


@definition
def put_f32(x_K, out):
    """Stores a row as it is."""
    for k in range(x_K.size):
        poke(out + 4 * k, x_K[k])


def _rows(op, step, thread, num_threads):
    a = ExpertRows.read(op)
    num_pairs = num_rows(op, step) * a.top_k
    for s in range(num_pairs if thread == 0 else 0):
        t = place_at(a.order, s, num_pairs) // a.top_k
        PUT(plain_row(a.x + 4 * a.width * t, a.width), a.out + ROW_BYTES(a.width) * s)


def _gated(op, step, thread, num_threads):
    a = ExpertGated.read(op)
    K, row_K = a.width, np.empty(a.width, np.float32)
    for s in range(num_rows(op, step) * a.top_k if thread == 0 else 0):
        x = plain_row(a.x + 8 * K * s, 2 * K)
        for k in range(K):
            row_K[k] = GATE(x[k], x[K + k])
        PUT(row_K, a.out + ROW_BYTES(K) * s)


@kernel
def _scatter(op, step, thread, num_threads):
    a = ExpertScatter.read(op)
    num_pairs = num_rows(op, step) * a.top_k
    for s in range(num_pairs if thread == 0 else 0):
        put_f32(plain_row(a.x + 4 * a.width * s, a.width), a.out + 4 * a.width * place_at(a.order, s, num_pairs))


def side_by_side(weight):
    """The weight layout of biases: those of all parts, [experts, their rows], side by side."""
    return (np.concatenate([part.finite_f32() for part in weight.parts], axis=1),)


BIASES = Layout("expert biases", side_by_side)


@definition
def add_bias(x_K, bias_K, out_K):
    """Shapes: x, bias, out [K] float32. Error: half an ulp. Order: one addition per element."""
    for k in range(x_K.size):
        out_K[k] = x_K[k] + bias_K[k]


@kernel
def _bias(op, step, thread, num_threads):
    a = ExpertBias.read(op)
    row_bytes, num_pairs = 4 * a.width, num_rows(op, step) * a.top_k
    for s in range(num_pairs if thread == 0 else 0):
        e = place_at(a.expert_ids, place_at(a.order, s, num_pairs), a.num_experts)
        x, bias = plain_row(a.x + row_bytes * s, a.width), plain_row(a.bias + row_bytes * e, a.width)
        add_bias(x, bias, plain_row(a.out + row_bytes * s, a.width))


def _linear(op, step, thread, num_threads):
    a = ExpertLinear.read(op)
    K, N, num_starts = a.width, a.features, num_rows(op, step) * a.top_k + 1
    for e in range(a.num_experts if thread == 0 else 0):
        for s in range(place_at(a.expert_start, e, num_starts), place_at(a.expert_start, e + 1, num_starts)):
            x = READ(a.x + ROW_BYTES(K) * s, K)
            for n in range(N):
                value = DOT(x, a.weight, e * N + n, K)
                bias = a.bias + 4 * (N * e + n)
                poke(a.out + 4 * (N * s + n), float32(value + peek(bias, float32) if a.bias else value))


PUTS = {"f32": put_f32, "bf16": round_row, "q8": quantize_row}
REFERENCE = {"expert_scatter": Implementation(_scatter), "expert_bias": Implementation(_bias, BIASES)}
for _rows_of in ROW_FORMATS.values():
    _name, _constants = _rows_of.name, dict(PUT=PUTS[_rows_of.name], ROW_BYTES=_rows_of.num_bytes)
    globals()[f"_rows_{_name}"] = variant(_rows, f"_rows_{_name}", **_constants)
    REFERENCE[f"expert_rows_{_name}"] = Implementation(globals()[f"_rows_{_name}"])
    for _activation, _gate in GATES.items():
        _kernel = f"_gated_{_activation}_{_name}"
        globals()[_kernel] = variant(_gated, _kernel, **_constants, GATE=_gate)
        REFERENCE[gated_kind(_activation, _name)] = Implementation(globals()[_kernel])
for _name, _product in PRODUCTS.items():
    globals()[f"_linear_{_name}"] = variant(_linear, f"_linear_{_name}", **constants(_product))
for _name, _format in FORMATS.items():
    _kernel = globals()[f"_linear_{_format.product.name}"]
    REFERENCE[f"expert_linear_{_name}"] = Implementation(_kernel, LAYOUTS[_name], layouts={"bias": BIASES})
