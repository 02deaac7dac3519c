"""Linear layers: the fast kernels. Rows by panels of sixteen features, a register tile through all of K.

A few rows are bound by the stream of weights; many by arithmetic. Threads claim runs of panels, so that uneven cores
balance; a run's weights are read from memory once and serve all rows, up to MAX_ROWS of them at a time from registers.

    panel (16 features)   [k block][16 features]...   one contiguous stream, see the formats
    tile, few rows        all rows x 1 panel of accumulators: panel follows panel, one stream of memory
    tile, many rows       MAX_ROWS x COLS panels: fewest loads for each dot, see linear_tile.py
"""

from functools import partial
from typing import NamedTuple

from lockstep.formats import FORMATS
from lockstep.formats.pack import pack
from lockstep.formats.parts.tiles import Ahead, Output, Panels, Rows
from lockstep.native.kernel import inlined, merged, variant
from lockstep.native.machine import fetch_add
from lockstep.native.numbers import int64
from lockstep.native.simd import peek
from lockstep.native.targets import wide_registers
from lockstep.ops.linear.grouped_linear import GroupedLinear
from lockstep.ops.linear.linear import Linear
from lockstep.ops.linear.tile import linear_tile
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.step import COUNTER, num_rows

COLS = 2 if wide_registers() else 1  # panels of a tile: 6 x 2 x 16 lanes fill 32 registers, 6 x 1 x 16 fill 16
MIN_ROWS, MAX_ROWS = 3, 6
ALL_PANELS = (1 << COLS) - 1  # a bit each
NEAR_BYTES = 34 * 1024  # weights of a tile that stay in the first-level cache, beside six rows of activations
K_UNIT = max(format.packed.size for format in FORMATS.values())
CACHE_BYTES = 192 * 1024  # activations that stay in the second-level cache while panels pass by
CLAIMS_FEW_ROWS, CLAIMS_MANY_ROWS = 8, 16  # of a thread: long streams for memory, even ends for arithmetic
MAX_CLAIM = 64  # panels
# of a variant: the op and its rows, the format, its sizes and its few rows, whether every row is alone, and what makes
# the tiles
OP = ROWS_OF = FORMAT = BLOCK = PANEL_BYTES = ROW_BYTES = FEW = ALONE = SWEEP = None


LAYOUTS = {
    name: Layout(f"{name} panels", partial(pack, format), format.packed.arrays) for name, format in FORMATS.items()
}


def constants(format):
    """What variants for a format of weights are made with."""
    few = format.few_rows if COLS == 2 else MAX_ROWS
    sizes = dict(BLOCK=format.packed.size, PANEL_BYTES=format.packed.panel.itemsize)
    return dict(FORMAT=format.name, ROW_BYTES=format.product.rows.num_bytes, FEW=few, **sizes)


@merged
def together(format, few, x, w, out, ahead, left):
    """COLS panels by `left` rows, as one tile (up to `few`) or in tiles of nearly equal height. Other arguments as of
    `linear_tile`.

    The first tile brings what comes next near; where there are several, the first two bring half of it each.
    """
    if left <= few:
        linear_tile(format, ((1, few), COLS, 1), left, x, w, out, ahead)
        return
    wanted = ALL_PANELS if left <= MAX_ROWS else ALL_PANELS // 2
    later = ALL_PANELS - wanted
    while left > 0:
        tiles = (left + MAX_ROWS - 1) // MAX_ROWS
        rows = (left + tiles - 1) // tiles
        next_panels = Ahead(ahead.codes, ahead.scales, wanted)
        linear_tile(format, ((MIN_ROWS, MAX_ROWS), COLS, COLS), rows, x, w, out, next_panels)
        left, x, out = left - rows, Rows(x.address + rows * x.stride, x.stride), below(out, rows)
        wanted, later = later, 0


@inlined
def below(out, rows):
    """The output so many rows further down."""
    residual = out.residual + rows * out.stride if out.residual else 0
    return Output(out.address + rows * out.stride, residual, out.stride, out.num_panels, out.resume)


@merged
def alone(format, few, x, w, out, ahead, left):
    """COLS panels by one row: `together` for left = 1."""
    linear_tile(format, ((1, 1), COLS, 1), 1, x, w, out, Ahead(ahead.codes, ahead.scales, 0))


@inlined
def rows_at_once(row):
    """How many rows of so many bytes stay in the second-level cache while panels pass by."""
    return max(MAX_ROWS, CACHE_BYTES // row // MAX_ROWS * MAX_ROWS)


@inlined
def claim_size(num_panels, num_threads, rows):
    """Panels that a thread claims at a time: enough claims to balance, few enough to stream."""
    size = num_panels // ((CLAIMS_FEW_ROWS if rows <= 2 * MAX_ROWS else CLAIMS_MANY_ROWS) * num_threads)
    return max(2, min(MAX_CLAIM, size - size % 2))


@inlined
def part_of_k(K, panel, rows, few):
    """How much of K is worked on at a time, so that the panels of a tile stay in the nearest cache for all rows."""
    part = NEAR_BYTES * K // (COLS * panel) // K_UNIT * K_UNIT
    return K if rows <= few else min(K, max(K_UNIT, part))


@inlined
def whole_rows(a, row, p):
    """Where the rows of x lie that panel p multiplies; row: bytes of in_features values."""
    return Rows(a.x, row)


@inlined
def rows_of_group(a, row, p):
    """The same where each group of panels has values of its own, side by side in a row."""
    return Rows(a.x + row * (16 * p // (a.out_features // a.groups)), row * a.groups)


class Sizes(NamedTuple):
    """Bytes of in_features values of x and of a panel, how many rows are worked on at a time, how much of K, and panels
    in all."""

    row: int
    panel: int
    at_once: int
    part: int
    num_panels: int


class Claim(NamedTuple):
    """Rows start .. end by panels first .. last; after: the panel that comes next."""

    start: int
    end: int
    first: int
    last: int
    after: int


@inlined
def output_at(a, t, p, num_panels, k, is_last):
    """Row t and panel p of a layer's output; the last part of K adds the residual."""
    place = 4 * (a.width * t + a.column + 16 * p)
    residual = a.residual + place if a.residual and is_last else 0
    return Output(a.out + place, residual, 4 * a.width, num_panels - p, k)


@merged
def sweep_claim(format, few, sweep, rows_of, a, sizes, claim):
    """A claim of the layer `a`, some rows and a part of K at a time."""
    K, row, panel = a.in_features, sizes.row, sizes.panel
    for t in range(claim.start, claim.end, sizes.at_once):
        after = claim.first if t + sizes.at_once < claim.end else claim.after
        for p in range(claim.first, claim.last, COLS):
            next_p = p + COLS if p + COLS < claim.last else after
            x = rows_of(a, row, p)
            for k in range(0, K, sizes.part):
                next_k, q = (k + sizes.part, p) if k + sizes.part < K else (0, next_p)
                codes, scales = a.weight.codes + panel * p + panel * k // K, a.weight.d + K * p + k
                next_codes = a.weight.codes + panel * q + panel * next_k // K
                sweep(
                    format,
                    few,
                    Rows(x.address + x.stride * t + row * k // K, x.stride),
                    Panels(codes, panel, scales, K, min(sizes.part, K - k)),
                    output_at(a, t, p, sizes.num_panels, k, next_k == 0),
                    Ahead(next_codes, a.weight.d + K * q + next_k, ALL_PANELS),
                    min(sizes.at_once, claim.end - t),
                )


def linear(op, step, thread, num_threads):
    """The thread's share of a linear layer.

    Claims are runs of panels by all rows, or by one. A claim is taken while the one before is worked on, so that its
    first panels can be brought near.
    """
    a, T = OP.read(op), num_rows(op, step)
    K, unit, num_panels = a.in_features, 1 if ALONE else T, (a.out_features + 15) // 16
    row, panel, size = (
        ROW_BYTES(K),
        K // BLOCK * PANEL_BYTES,
        claim_size(num_panels, num_threads, min(T, unit)),
    )
    sizes = Sizes(row, panel, rows_at_once(row), part_of_k(K, panel, min(T, unit), FEW), num_panels)
    num_claims, counter = (num_panels + size - 1) // size, peek(op + 8 * COUNTER, int64)
    claim, next_claim = fetch_add(counter, 1), fetch_add(counter, 1)
    while claim * unit < num_claims * T:
        start, first = claim // num_claims * unit, claim % num_claims * size
        end, last = min(start + unit, T), min(first + size, num_panels)
        after = next_claim % num_claims * size
        sweep_claim(FORMAT, FEW, SWEEP, ROWS_OF, a, sizes, Claim(start, end, first, last, after))
        claim, next_claim = next_claim, fetch_add(counter, 1)


CPU, PER_TOKEN = {}, {}  # per token every row reads all weights anew, with the same one-row tile
for _name, _format in FORMATS.items():
    for _op, _rows_of in ((Linear, whole_rows), (GroupedLinear, rows_of_group)):
        for _table, _sweep, _suffix in ((CPU, together, ""), (PER_TOKEN, alone, "_per_token")):
            _kind = f"{_op.name()}_{_name}"
            _how = constants(_format) | dict(OP=_op, ROWS_OF=_rows_of, ALONE=_sweep is alone, SWEEP=_sweep)
            globals()[_kind + _suffix] = variant(linear, _kind + _suffix, **_how)
            _kernel = globals()[_kind + _suffix]
            _table[_kind] = Implementation(_kernel, LAYOUTS[_name], flushes=_format.flushes)
