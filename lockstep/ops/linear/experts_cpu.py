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
from lockstep.native.machine import fetch_add, stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import load, peek, store
from lockstep.ops.elementwise.activations_cpu import MADE, MADE_BYTES, put_quantized, put_rounded
from lockstep.ops.elementwise.gated_mul_cpu import gate_values
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
from lockstep.ops.linear.linear_cpu import (
    ALL_PANELS,
    COLS,
    ENOUGH_CLAIMS,
    PLAIN_LAYOUTS,
    cache_of,
    constants,
    multiply_parts,
    multiply_rows,
    rows_at_once,
)
from lockstep.ops.linear.moe import place_at
from lockstep.ops.linear.tile import needs_flushing, panel_bytes, scale_bytes
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, num_rows

FEWEST_PANELS, MOST_PANELS = 2, 8  # of a claim
PUT = FORMAT = ROW_BYTES = SHAPES = GATE = None  # constants of the variants below


@inlined
def put_plain(x, num_values, out):
    """Copies num_values float32 at address x, a multiple of 16."""
    for i in range(0, 4 * num_values, 64):
        store(out + i, load(x + i))


def _rows(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a = ExpertRows.read(op)
    num_pairs = num_rows(op, step) * a.top_k
    for s in range(thread, num_pairs, num_threads):
        x = a.x + 4 * a.width * (place_at(a.order, s, num_pairs) // a.top_k)
        PUT(x, a.width, a.out + ROW_BYTES(a.width) * s)


def _gated(op, step, thread, num_threads):
    """Rows are dealt to threads in turn."""
    a, memory = ExpertGated.read(op), stack_memory(MADE_BYTES)
    for s in range(thread, num_rows(op, step) * a.top_k, num_threads):
        x, out = a.x + 8 * a.width * s, a.out + ROW_BYTES(a.width) * s
        for i in range(0, a.width, MADE):
            num_values = min(MADE, a.width - i)
            gate_values(GATE, x + 4 * i, x + 4 * (a.width + i), num_values, memory)
            PUT(memory, num_values, out + ROW_BYTES(i))


@kernel
def scatter(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; the width is a multiple of 16."""
    a = ExpertScatter.read(op)
    row_bytes, num_pairs = 4 * a.width, num_rows(op, step) * a.top_k
    for s in range(thread, num_pairs, num_threads):
        put_plain(a.x + row_bytes * s, a.width, a.out + row_bytes * place_at(a.order, s, num_pairs))


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


@inlined
def expert_of(expert_start, num_starts, num_experts, num_claims, claim, e, num_before):
    """(The expert of a claim, the claims of chosen experts before it), found from expert e on, which has num_before;
    num_experts if there are fewer claims. An expert has num_claims of them if a row has chosen it, else none.
    num_starts: a bound of what expert_start may hold."""
    while e < num_experts:
        is_chosen = place_at(expert_start, e, num_starts) < place_at(expert_start, e + 1, num_starts)
        if is_chosen and claim < num_before + num_claims:
            break
        num_before += num_claims if is_chosen else 0
        e += 1
    return e, num_before


@inlined
def claim_panels(num_panels, num_chosen, num_threads):
    """How many panels a thread claims at a time, where rows choose at most num_chosen experts: fewer where there are
    many threads. Even, as tiles are two panels wide."""
    size = num_panels * num_chosen // (ENOUGH_CLAIMS * num_threads)
    return max(FEWEST_PANELS, min(MOST_PANELS, size - size % 2))


def _linear(op, step, thread, num_threads):
    """The thread's share of all experts' products. It takes its next claim before it works on the one at hand, so that
    the first panels of the next claim can be prefetched."""
    a = ExpertLinear.read(op)
    E, K, num_panels, row_bytes = a.num_experts, a.width, a.features // 16, ROW_BYTES(a.width)
    at_once, codes_stride = rows_at_once(row_bytes, cache_of(FORMAT)), panel_bytes(FORMAT, K, a.weight.d)
    scale_stride, num_starts = scale_bytes(FORMAT, K) if a.weight.d else 0, num_rows(op, step) * a.top_k + 1
    size = claim_panels(num_panels, min(E, num_starts - 1), num_threads)
    num_claims, counter = (num_panels + size - 1) // size, peek(op + 8 * COUNTER, int64)
    claim = fetch_add(counter, 1)
    e, num_before = expert_of(a.expert_start, num_starts, E, num_claims, claim, 0, 0)
    while e < E:
        next_claim = fetch_add(counter, 1)
        next_e, next_before = expert_of(a.expert_start, num_starts, E, num_claims, next_claim, e, num_before)
        first, next_first = size * (claim - num_before), size * (next_claim - next_before)
        end, stop = min(first + size, num_panels), place_at(a.expert_start, e + 1, num_starts)
        for s in range(place_at(a.expert_start, e, num_starts), stop, at_once):
            panel_after = e * num_panels + first if s + at_once < stop else next_e * num_panels + next_first
            rows = min(at_once, stop - s)
            for p in range(first, end, COLS):
                panel = e * num_panels + p
                panel_ahead = panel + COLS if p + COLS < end else panel_after
                out, bias = a.out + 64 * (num_panels * s + p), a.bias + 64 * panel if a.bias else 0
                codes, scales = a.weight.codes + codes_stride * panel, a.weight.d + scale_stride * panel
                codes_ahead = a.weight.codes + codes_stride * panel_ahead
                scales_ahead = a.weight.d + scale_stride * panel_ahead
                multiply_parts(
                    FORMAT,
                    SHAPES,
                    multiply_rows,
                    Rows(a.x + row_bytes * s, row_bytes),
                    Panels(codes, codes_stride, scales, scale_stride, K, 0),
                    Output(out, 64 * num_panels, bias, 0, num_panels - p, 0, 1),
                    Ahead(codes_ahead, codes_stride, scales_ahead, scale_stride, ALL_PANELS),
                    rows,
                )
        claim, e, num_before = next_claim, next_e, next_before


PUTS = {"f32": put_plain, "bf16": put_rounded, "q8": put_quantized}
CPU = {"expert_scatter": Implementation(scatter), "expert_bias": Implementation(bias, BIASES)}
for _rows_of in ROW_FORMATS.values():
    _name, _constants = _rows_of.name, dict(PUT=PUTS[_rows_of.name], ROW_BYTES=_rows_of.num_bytes)
    globals()[f"rows_{_name}"] = variant(_rows, f"rows_{_name}", **_constants)
    CPU[f"expert_rows_{_name}"] = Implementation(globals()[f"rows_{_name}"])
    for _activation, _gate in GATES.items():
        _kernel = f"gated_{_activation}_{_name}"
        globals()[_kernel] = variant(_gated, _kernel, **_constants, GATE=_gate)
        CPU[gated_kind(_activation, _name)] = Implementation(globals()[_kernel])
for _name, _format in FORMATS.items():
    globals()[f"linear_{_name}"] = variant(_linear, f"linear_{_name}", **constants(_format))
    _kernel, _biases = globals()[f"linear_{_name}"], {"bias": BIASES}
    CPU[f"expert_linear_{_name}"] = Implementation(_kernel, PLAIN_LAYOUTS[_name], needs_flushing(_format), _biases)
