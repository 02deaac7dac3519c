"""The linear layers of a mixture of experts: the fast kernels.

One expert's rows lie together, so each expert is a linear layer of few rows, made of the tiles of `linear_cpu`. Few
tokens are bound by the stream of the chosen experts' weights, many tokens by arithmetic. Threads claim pairs of an
expert and a run of panels; an expert that no token chose costs one comparison.
"""

from lockstep.formats import FORMATS
from lockstep.formats.parts.rows import ROW_FORMATS
from lockstep.formats.parts.tiles import Ahead, Output, Panels, Rows
from lockstep.native.kernel import inlined, kernel, variant
from lockstep.native.machine import fetch_add
from lockstep.native.numbers import int64
from lockstep.native.simd import load, peek, store
from lockstep.ops.elementwise.activations_cpu import store_q8, store_rounded
from lockstep.ops.elementwise.gates import GATES
from lockstep.ops.linear.experts import (
    BIASES,
    ExpertBias,
    ExpertGated,
    ExpertLinear,
    ExpertRows,
    ExpertScatter,
    gated_kind,
)
from lockstep.ops.linear.linear_cpu import ALL_PANELS, COLS, LAYOUTS, constants, multiply_rows, rows_at_once
from lockstep.ops.linear.moe import place_at
from lockstep.ops.linear.tile import scale_bytes
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, num_rows

CLAIM = 8  # panels that a thread claims at a time
STORE = FORMAT = PANEL_BYTES = BLOCK = ROW_BYTES = SHAPES = GATE = None  # constants of the variants below


@inlined
def store_plain(low, high, out, K, i):
    """Stores elements i .. i + 31 of a row as they are."""
    store(out + 4 * i, low)
    if i + 16 < K:
        store(out + 4 * i + 64, high)


def _rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = ExpertRows.read(op)
    num_pairs = num_rows(op, step) * a.top_k
    for s in range(thread, num_pairs, num_threads):
        x, out = a.x + 4 * a.width * (place_at(a.order, s, num_pairs) // a.top_k), a.out + ROW_BYTES(a.width) * s
        for i in range(0, a.width, 32):
            STORE(load(x + 4 * i), load(x + 4 * i + 64), out, a.width, i)


def _gated(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = ExpertGated.read(op)
    for s in range(thread, num_rows(op, step) * a.top_k, num_threads):
        x, out = a.x + 8 * a.width * s, a.out + ROW_BYTES(a.width) * s
        for i in range(0, a.width, 32):
            gate, up = x + 4 * i, x + 4 * (a.width + i)
            STORE(GATE(load(gate), load(up)), GATE(load(gate + 64), load(up + 64)), out, a.width, i)


@kernel
def scatter(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; the width is a multiple of 16."""
    a = ExpertScatter.read(op)
    row_bytes, num_pairs = 4 * a.width, num_rows(op, step) * a.top_k
    for s in range(thread, num_pairs, num_threads):
        x, out = a.x + row_bytes * s, a.out + row_bytes * place_at(a.order, s, num_pairs)
        for i in range(0, row_bytes, 64):
            store(out + i, load(x + i))


@kernel
def bias(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; the width is a multiple of 16."""
    a = ExpertBias.read(op)
    row_bytes, num_pairs = 4 * a.width, num_rows(op, step) * a.top_k
    for s in range(thread, num_pairs, num_threads):
        x, out = a.x + row_bytes * s, a.out + row_bytes * s
        row = a.bias + row_bytes * place_at(a.expert_ids, place_at(a.order, s, num_pairs), a.num_experts)
        for i in range(0, row_bytes, 64):
            store(out + i, load(x + i) + load(row + i))


def _linear(op, step, thread, num_threads):
    """The thread's share of all experts' products."""
    a = ExpertLinear.read(op)
    K, num_panels, row_bytes, panel_bytes = (
        a.width,
        a.features // 16,
        ROW_BYTES(a.width),
        a.width // BLOCK * PANEL_BYTES,
    )
    at_once, scale_stride, num_starts = (
        rows_at_once(row_bytes),
        scale_bytes(FORMAT, K),
        num_rows(op, step) * a.top_k + 1,
    )
    num_claims, counter = (num_panels + CLAIM - 1) // CLAIM, peek(op + 8 * COUNTER, int64)
    claim = fetch_add(counter, 1)
    while claim < a.num_experts * num_claims:
        e, first = claim // num_claims, claim % num_claims * CLAIM
        start, stop = place_at(a.expert_start, e, num_starts), place_at(a.expert_start, e + 1, num_starts)
        for s in range(start, stop, at_once):
            for p in range(first, min(first + CLAIM, num_panels), COLS):
                panel = e * num_panels + p
                codes, scales = a.weight.codes + panel_bytes * panel, a.weight.d + scale_stride * panel
                multiply_rows(
                    FORMAT,
                    SHAPES,
                    Rows(a.x + row_bytes * s, row_bytes),
                    Panels(codes, panel_bytes, scales, scale_stride, K),
                    Output(a.out + 64 * (num_panels * s + p), 0, 64 * num_panels, num_panels - p, 0),
                    Ahead(codes + panel_bytes * COLS, scales + scale_stride * COLS, ALL_PANELS),
                    min(at_once, stop - s),
                )
        claim = fetch_add(counter, 1)


STORES = {"f32": store_plain, "bf16": store_rounded, "q8": store_q8}
CPU = {"expert_scatter": Implementation(scatter), "expert_bias": Implementation(bias, BIASES)}
for _rows_of in ROW_FORMATS.values():
    _name, _constants = _rows_of.name, dict(STORE=STORES[_rows_of.name], ROW_BYTES=_rows_of.num_bytes)
    globals()[f"rows_{_name}"] = variant(_rows, f"rows_{_name}", **_constants)
    CPU[f"expert_rows_{_name}"] = Implementation(globals()[f"rows_{_name}"])
    for _activation, _gate in GATES.items():
        _kernel = f"gated_{_activation}_{_name}"
        globals()[_kernel] = variant(_gated, _kernel, **_constants, GATE=_gate)
        CPU[gated_kind(_activation, _name)] = Implementation(globals()[_kernel])
for _name, _format in FORMATS.items():
    globals()[f"linear_{_name}"] = variant(_linear, f"linear_{_name}", **constants(_format))
    CPU[f"expert_linear_{_name}"] = Implementation(globals()[f"linear_{_name}"], LAYOUTS[_name], _format.flushes)
