"""Linear layers in integer arithmetic: the fast kernel. Rows by panels of 16 features, as `ops/linear/linear_cpu.py`.

Bound by arithmetic for many rows, by the stream of codes for few. Threads claim runs of panels; a tile of up to
MAX_ROWS rows by COLS panels goes through all of K in registers, since its sums are integers until the end.
"""

from lockstep.formats.parts.tiles import Ahead, Panels, Rows
from lockstep.native.kernel import inlined, variant
from lockstep.native.machine import fetch_add
from lockstep.native.numbers import int32, int64
from lockstep.native.simd import peek
from lockstep.ops.integer.code_fixed import CodeFixed
from lockstep.ops.integer.code_linear import CodeLinear
from lockstep.ops.integer.code_rows import TAIL_PLANES, code_bytes, plane_bytes
from lockstep.ops.integer.code_tile import code_tile
from lockstep.ops.integer.code_weights import PANELS
from lockstep.ops.linear.linear_cpu import (
    ALL_PANELS,
    COLS,
    MAX_ROWS,
    below,
    claim_size,
    merged,
    only,
    output_at,
    rows_at_once,
)
from lockstep.runtime.backend import Implementation
from lockstep.runtime.step import COUNTER, num_rows

WORD_BYTES = 256  # of a panel beside its codes: four words for each of 16 features
# constants of a variant: the op; the key of `code_tile.SCALINGS` for its sums; a function for the address of its grid
OP = SCALING = GRID = None


@inlined
def no_grid(a):
    return 0


@inlined
def own_grid(a):
    return a.grid


@merged
def tiles(planes, scaling, x, w, out, ahead, grid, rows_left):
    """COLS panels by rows_left rows, in tiles of nearly equal height; the first tile prefetches the next panels."""
    while rows_left > 0:
        num_tiles = (rows_left + MAX_ROWS - 1) // MAX_ROWS
        rows = (rows_left + num_tiles - 1) // num_tiles
        code_tile((planes, (1, MAX_ROWS), COLS, scaling), rows, x, w, out, ahead, grid)
        rows_left, x, out = rows_left - rows, Rows(x.address + rows * x.stride, x.stride), below(out, rows)
        ahead = only(ahead, 0)


@merged
def sweep(planes, scaling, a, grid, num_rows, first, last):
    """All rows by panels first .. last - 1; as many rows at a time as stay in the cache while the panels pass by."""
    K, row, at_once = plane_bytes(a.in_features), code_bytes(a.in_features), rows_at_once(planes * a.in_features)
    num_panels = (a.out_features + 15) // 16
    for t in range(0, num_rows, at_once):
        for p in range(first, last, COLS):
            w = Panels(a.weight.codes + 16 * K * p, 16 * K, a.weight.d + WORD_BYTES * p, WORD_BYTES, K, 0)
            out, x = output_at(a, t, p, num_panels), Rows(a.x + row * t, row)
            ahead = Ahead(w.codes + 16 * K * COLS, w.codes_stride, w.scales, w.scales_stride, ALL_PANELS)
            tiles(planes, scaling, x, w, out, ahead, grid, min(at_once, num_rows - t))


def linear(op, step, thread, num_threads):
    """The thread's share: runs of panels, claimed one after the other. All rows have as many planes as the first."""
    a, T, counter = OP.read(op), num_rows(op, step), peek(op + 8 * COUNTER, int64)
    num_panels = (a.out_features + 15) // 16
    size = claim_size(num_panels, num_threads, T)
    planes = peek(a.x + 2 * plane_bytes(a.in_features) + TAIL_PLANES, int32)
    claim = fetch_add(counter, 1)
    while T > 0 and claim * size < num_panels:
        first, last = claim * size, min(claim * size + size, num_panels)
        if planes == 1:
            sweep(1, SCALING, a, GRID(a), T, first, last)
        else:
            sweep(2, SCALING, a, GRID(a), T, first, last)
        claim = fetch_add(counter, 1)


code_linear = variant(linear, "code_linear", OP=CodeLinear, SCALING="float", GRID=no_grid)
code_fixed = variant(linear, "code_fixed", OP=CodeFixed, SCALING="fixed", GRID=own_grid)
CPU = {"code_linear": Implementation(code_linear, PANELS), "code_fixed": Implementation(code_fixed, PANELS)}
