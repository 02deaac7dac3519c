"""Linear layers in integer arithmetic: the fast kernel. Rows by panels of sixteen features, as `ops/linear_cpu.py`.

Bound by arithmetic for many rows, by the stream of codes for few. Threads claim runs of panels; a tile of up to
MAX_ROWS rows by COLS panels goes through all of K in registers, since its sums are integers until the end.
"""

from numba import int32, int64

from lockstep.ops.code_linear import CodeLinear
from lockstep.ops.code_rows import TAIL_PLANES, code_bytes, plane_bytes
from lockstep.ops.code_weights import PANELS
from lockstep.ops.linear_cpu import ALL_PANELS, COLS, MAX_ROWS, claim_size, merged, output_at, rows_at_once
from lockstep.runtime.backend import Implementation
from lockstep.runtime.kernel import inlined, kernel
from lockstep.runtime.machine import fetch_add
from lockstep.runtime.simd import peek
from lockstep.runtime.step import COUNTER, num_rows
from lockstep.runtime.tiles_codes import code_tile
from lockstep.runtime.tiles_linear import Ahead, Output, Panels, Rows

WORD_BYTES = 256  # of a panel: what its features have beside codes


@merged
def tiles(planes, x, w, out, ahead, left):
    """COLS panels by `left` rows, in tiles of nearly equal height; the first one brings what comes next near."""
    while left > 0:
        count = (left + MAX_ROWS - 1) // MAX_ROWS
        rows = (left + count - 1) // count
        code_tile(planes, ((1, MAX_ROWS), COLS), rows, x, w, out, ahead)
        left, x, out = left - rows, Rows(x.address + rows * x.stride, x.stride), below(out, rows)
        ahead = Ahead(ahead.codes, ahead.scales, 0)


@inlined
def below(out, rows):
    """The output so many rows further down."""
    residual = out.residual + rows * out.stride if out.residual else 0
    return Output(out.address + rows * out.stride, residual, out.stride, out.num_panels, out.resume)


@merged
def sweep(planes, a, num_rows, first, last):
    """Panels first .. last by all rows, so many at a time as stay near while panels pass by."""
    K, row, at_once = plane_bytes(a.in_features), code_bytes(a.in_features), rows_at_once(planes * a.in_features)
    num_panels = (a.out_features + 15) // 16
    for t in range(0, num_rows, at_once):
        for p in range(first, last, COLS):
            w = Panels(a.weight.codes + 16 * K * p, 16 * K, a.weight.d + WORD_BYTES * p, WORD_BYTES, K)
            out, x = output_at(a, t, p, num_panels, 0, True), Rows(a.x + row * t, row)
            ahead = Ahead(w.codes + 16 * K * COLS, w.scales, ALL_PANELS)
            tiles(planes, x, w, out, ahead, min(at_once, num_rows - t))


@kernel
def code_linear(op, step, thread, num_threads):
    """The thread's share: runs of panels, claimed one after the other. All rows have as many planes as the first."""
    a, T, counter = CodeLinear.read(op), num_rows(op, step), peek(op + 8 * COUNTER, int64)
    num_panels = (a.out_features + 15) // 16
    size = claim_size(num_panels, num_threads, T)
    planes = peek(a.x + 2 * plane_bytes(a.in_features) + TAIL_PLANES, int32)
    claim = fetch_add(counter, 1)
    while T > 0 and claim * size < num_panels:
        first, last = claim * size, min(claim * size + size, num_panels)
        if planes == 1:
            sweep(1, a, T, first, last)
        else:
            sweep(2, a, T, first, last)
        claim = fetch_add(counter, 1)


CPU = {"code_linear": Implementation(code_linear, PANELS)}
