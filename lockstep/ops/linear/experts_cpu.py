"""The linear layers of a mixture of experts: the fast kernels.

One expert's rows lie together, so each expert is a linear layer of few rows, made of the tiles of `linear_cpu`. Few
tokens are bound by the stream of the chosen experts' weights, many tokens by arithmetic. Threads claim pairs of an
expert and a run of panels, of experts that a token chose only: an expert that none chose costs each thread one
comparison.
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
    pair_at,
)
from lockstep.ops.linear.linear_cpu import ALL_PANELS, COLS, LAYOUTS, constants, multiply_rows, rows_at_once
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
    for s in range(thread, num_rows(op, step) * a.top_k, num_threads):
        x, out = a.x + 4 * a.width * (pair_at(a.order, s) // a.top_k), a.out + ROW_BYTES(a.width) * s
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
    row_bytes = 4 * a.width
    for s in range(thread, num_rows(op, step) * a.top_k, num_threads):
        x, out = a.x + row_bytes * s, a.out + row_bytes * pair_at(a.order, s)
        for i in range(0, row_bytes, 64):
            store(out + i, load(x + i))


@kernel
def bias(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; the width is a multiple of 16."""
    a = ExpertBias.read(op)
    row_bytes = 4 * a.width
    for s in range(thread, num_rows(op, step) * a.top_k, num_threads):
        x, out = a.x + row_bytes * s, a.out + row_bytes * s
        row = a.bias + row_bytes * pair_at(a.expert_ids, pair_at(a.order, s))
        for i in range(0, row_bytes, 64):
            store(out + i, load(x + i) + load(row + i))


@inlined
def expert_of(expert_start, num_experts, num_claims, claim, e, num_before):
    """(The expert of a claim, the claims of chosen experts before it), found from expert e on, which has num_before;
    num_experts if there are fewer claims. An expert has num_claims of them if a row has chosen it, else none."""
    while e < num_experts:
        is_chosen = pair_at(expert_start, e) < pair_at(expert_start, e + 1)
        if is_chosen and claim < num_before + num_claims:
            break
        num_before += num_claims if is_chosen else 0
        e += 1
    return e, num_before


def _linear(op, step, thread, num_threads):
    """The thread's share of all experts' products. It takes its next claim before it works on the one at hand, so that
    the first panels of the next claim can be prefetched."""
    a = ExpertLinear.read(op)
    E, K, num_panels, row_bytes = a.num_experts, a.width, a.features // 16, ROW_BYTES(a.width)
    panel_bytes, scale_stride, at_once = K // BLOCK * PANEL_BYTES, scale_bytes(FORMAT, K), rows_at_once(row_bytes)
    num_claims, counter = (num_panels + CLAIM - 1) // CLAIM, peek(op + 8 * COUNTER, int64)
    claim = fetch_add(counter, 1)
    e, num_before = expert_of(a.expert_start, E, num_claims, claim, 0, 0)
    while e < E:
        next_claim = fetch_add(counter, 1)
        next_e, next_before = expert_of(a.expert_start, E, num_claims, next_claim, e, num_before)
        first, next_first = CLAIM * (claim - num_before), CLAIM * (next_claim - next_before)
        end, start, stop = min(first + CLAIM, num_panels), pair_at(a.expert_start, e), pair_at(a.expert_start, e + 1)
        for s in range(start, stop, at_once):
            panel_after = e * num_panels + first if s + at_once < stop else next_e * num_panels + next_first
            for p in range(first, end, COLS):
                panel = e * num_panels + p
                panel_ahead = panel + COLS if p + COLS < end else panel_after
                codes, scales = a.weight.codes + panel_bytes * panel, a.weight.d + scale_stride * panel
                codes_ahead = a.weight.codes + panel_bytes * panel_ahead
                multiply_rows(
                    FORMAT,
                    SHAPES,
                    Rows(a.x + row_bytes * s, row_bytes),
                    Panels(codes, panel_bytes, scales, scale_stride, K),
                    Output(a.out + 64 * (num_panels * s + p), 0, 64 * num_panels, num_panels - p, 0),
                    Ahead(codes_ahead, a.weight.d + scale_stride * panel_ahead, ALL_PANELS),
                    min(at_once, stop - s),
                )
        claim, e, num_before = next_claim, next_e, next_before


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
