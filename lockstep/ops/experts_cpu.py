"""The linear layers of a mixture of experts: the fast kernels.

One expert's rows lie together, so each expert is a linear layer of few rows, made of the tiles of `linear_cpu`. Few
tokens are bound by the stream of the chosen experts' weights, many by arithmetic. Threads claim (expert, run of
panels); an expert that no token chose costs one comparison.
"""

from numba import int64

from lockstep.ops.activations import row_bytes as q8_bytes
from lockstep.ops.activations_cpu import store_q8, store_rounded
from lockstep.ops.experts import (
    ExpertGated,
    ExpertLinear,
    ExpertRows,
    ExpertScatter,
    bf16_bytes,
    f32_bytes,
    pair_at,
)
from lockstep.ops.linear_cpu import CACHE_BYTES, COLS, MAX_ROWS, together
from lockstep.ops.math import silu
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.kernel import inlined, kernel, variant
from lockstep.runtime.machine import fetch_add
from lockstep.runtime.simd import load, peek, store
from lockstep.runtime.step import COUNTER, num_rows
from lockstep.runtime.tiles_dots import Q4_1_BYTES, Q5_0_BYTES, Q5_1_BYTES
from lockstep.runtime.tiles_k import Q5_K_BYTES
from lockstep.runtime.tiles_linear import (
    BF16_TILE,
    F16_TILE,
    F32_TILE,
    Q4_0_TILE,
    Q4_1_TILE,
    Q5_0_TILE,
    Q5_1_TILE,
    Q5_K_TILE,
    Q8_0_TILE,
)
from lockstep.weights.pack import pack_bf16, pack_f16, pack_f32, pack_q4_0, pack_q8_0
from lockstep.weights.pack_k import pack_q5_k
from lockstep.weights.pack_q5 import pack_q4_1, pack_q5_0, pack_q5_1

CLAIM = 8  # panels that a thread takes at a time
STORE = TILE = PANEL_BYTES = BLOCK = ROW_BYTES = None  # constants of the variants below


@inlined
def store_plain(low, high, out, K, i):
    """Elements i .. i + 31 of a row as they are."""
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
            g, up = x + 4 * i, x + 4 * (a.width + i)
            STORE(silu(load(g)) * load(up), silu(load(g + 64)) * load(up + 64), out, a.width, i)


@kernel
def scatter(op, step, thread, num_threads):
    """Rows are dealt to threads in turn; the width is a multiple of 16."""
    a = ExpertScatter.read(op)
    row = 4 * a.width
    for s in range(thread, num_rows(op, step) * a.top_k, num_threads):
        x, out = a.x + row * s, a.out + row * pair_at(a.order, s)
        for i in range(0, row, 64):
            store(out + i, load(x + i))


def _linear(op, step, thread, num_threads):
    """The thread's share of all experts' products."""
    a = ExpertLinear.read(op)
    K, num_panels, row, panel = a.width, a.features // 16, ROW_BYTES(a.width), a.width // BLOCK * PANEL_BYTES
    at_once = max(MAX_ROWS, CACHE_BYTES // row // MAX_ROWS * MAX_ROWS)
    claims, counter = (num_panels + CLAIM - 1) // CLAIM, peek(op + 8 * COUNTER, int64)
    task = fetch_add(counter, 1)
    while task < a.num_experts * claims:
        e, first = task // claims, task % claims * CLAIM
        start, stop = pair_at(a.expert_start, e), pair_at(a.expert_start, e + 1)
        for s in range(start, stop, at_once):
            for p in range(first, min(first + CLAIM, num_panels), COLS):
                at = e * num_panels + p
                together(
                    TILE,
                    a.x + row * s,
                    row,
                    a.weight.codes + panel * at,
                    panel,
                    a.weight.d + K * at,
                    K,
                    K,
                    0,
                    a.out + 64 * (num_panels * s + p),
                    64 * num_panels,
                    num_panels - p,
                    0,
                    a.weight.codes + panel * (at + COLS),
                    a.weight.d + K * (at + COLS),
                    min(at_once, stop - s),
                )
        task = fetch_add(counter, 1)


ROWS = {
    "f32": dict(STORE=store_plain, ROW_BYTES=f32_bytes),
    "bf16": dict(STORE=store_rounded, ROW_BYTES=bf16_bytes),
    "q8": dict(STORE=store_q8, ROW_BYTES=q8_bytes),
}
FORMATS = {  # tile, bytes of a panel's block and weights of a feature in it, bytes of a prepared row, layout
    "f32": (F32_TILE, 64, 1, f32_bytes, Layout("f32 panels", pack_f32)),
    "f16": (F16_TILE, 32, 1, f32_bytes, Layout("f16 panels", pack_f16)),
    "bf16": (BF16_TILE, 32, 1, bf16_bytes, Layout("bf16 panels", pack_bf16)),
    "q8_0": (Q8_0_TILE, 16, 1, q8_bytes, Layout("q8_0 panels", pack_q8_0, ("codes", "d"))),
    "q4_0": (Q4_0_TILE, 8, 1, q8_bytes, Layout("q4_0 panels", pack_q4_0, ("codes", "d"))),
    "q4_1": (Q4_1_TILE, Q4_1_BYTES, 32, q8_bytes, Layout("q4_1 panels", pack_q4_1)),
    "q5_0": (Q5_0_TILE, Q5_0_BYTES, 32, q8_bytes, Layout("q5_0 panels", pack_q5_0, ("codes", "d"))),
    "q5_1": (Q5_1_TILE, Q5_1_BYTES, 32, q8_bytes, Layout("q5_1 panels", pack_q5_1)),
    "q5_k": (Q5_K_TILE, Q5_K_BYTES, 256, q8_bytes, Layout("q5_k panels", pack_q5_k)),
}
CPU = {"expert_scatter": Implementation(scatter)}
for _name, _constants in ROWS.items():
    globals()[f"rows_{_name}"] = variant(_rows, f"rows_{_name}", **_constants)
    globals()[f"gated_{_name}"] = variant(_gated, f"gated_{_name}", **_constants)
    CPU[f"expert_rows_{_name}"] = Implementation(globals()[f"rows_{_name}"])
    CPU[f"expert_gated_{_name}"] = Implementation(globals()[f"gated_{_name}"])
for _name, (_tile, _bytes, _block, _row, _layout) in FORMATS.items():
    _constants = dict(TILE=_tile, PANEL_BYTES=_bytes, BLOCK=_block, ROW_BYTES=_row)
    globals()[f"linear_{_name}"] = variant(_linear, f"linear_{_name}", **_constants)
    CPU[f"expert_linear_{_name}"] = Implementation(globals()[f"linear_{_name}"], _layout, _name == "bf16")
