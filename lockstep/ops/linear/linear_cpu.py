"""Linear layers: the fast kernels. Rows by panels of sixteen features, a register tile through all of K.

A few rows are bound by the stream of weights, many rows by arithmetic. Threads claim runs of panels, so that the work
balances over uneven cores. The weights of a run are read from memory once for all rows; a tile has up to MAX_ROWS rows.

    panel (16 features)   [k block][16 features]...   one contiguous stream, see the formats
    tile, few rows        all rows x 1 panel of accumulators: panel follows panel, one stream of memory
    tile, many rows       MAX_ROWS x COLS panels: fewest loads for each dot, see ops/linear/tile.py; or, where codes
                          take longest to unpack, COLS * MAX_ROWS x 1 panel; or as many rows as the target says
"""

from functools import partial
from typing import NamedTuple

from lockstep.formats import FORMATS
from lockstep.formats.pack import pack, pack_dense
from lockstep.formats.parts.rows import QUANTIZED
from lockstep.formats.parts.tiles import Ahead, Output, Panels, Rows
from lockstep.native.kernel import inlined, merged, variant
from lockstep.native.machine import fetch_add, stack_memory
from lockstep.native.numbers import int64
from lockstep.native.simd import peek
from lockstep.native.targets import TARGET
from lockstep.ops.linear.grouped_linear import GroupedLinear
from lockstep.ops.linear.linear import Linear
from lockstep.ops.linear.tile import (
    K_UNIT,
    is_dense,
    linear_tile,
    needs_flushing,
    panel_bytes,
    row_offset,
    scale_bytes,
    scale_offset,
    unpacked_bytes,
)
from lockstep.ops.share import neighbouring
from lockstep.runtime.backend import Implementation, Layout
from lockstep.runtime.step import COUNTER, num_rows

COLS = TARGET.panels  # of a tile: 6 x 2 x 16 lanes fill 32 registers, 6 x 1 x 16 fill 16
MIN_ROWS, MAX_ROWS = 3, 6
WHOLE_FEWEST = 2  # rows of a tile of whole panels, where there are several: see `Target.whole_tile`
ALL_PANELS = (1 << COLS) - 1  # of a tile, one bit for each
NEAR_BYTES = 48 * 1024  # weights of a tile that are read again and again; a first-level cache may hold a part of them
FEW_ROWS_DENSE = 2  # rows that share each panel of a dense layout while it streams by
# the fewest and the most rows of the taller tiles that unpack a dense layout
DENSE_HEIGHTS = 3, 8 if COLS > 1 else min(format.narrow_rows for format in FORMATS.values() if format.dense)
UNPACKED_BYTES = 64 * 1024  # of the panels of a tile, in the part of K that is worked on at a time
# activations that stay in the second-level cache while panels pass by; the more rows, the fewer times panels are
# unpacked, which take less of the cache themselves
CACHE_BYTES, UNPACKING_CACHE_BYTES = 192 * 1024, 640 * 1024
CLAIMS_FEW_ROWS, CLAIMS_MANY_ROWS = 8, 16  # a thread: few for long streams, many so that threads end together
MAX_CLAIM = 64  # panels
# where panels are too few for so many claims a thread, rows are cut, too, into shares of at least so many rows
ENOUGH_CLAIMS, LEAST_ROWS = 4, 8 * MAX_ROWS
# Constants of each variant. OP: the op; ROWS_OF: finds the rows of a panel, as `whole_rows`; FORMAT: of the weights,
# with ROW_BYTES; SHAPES: of tiles, see `shapes_of`; ONE_ROW: whether every row reads all weights by itself; MULTIPLY:
# makes the tiles, as `multiply_rows`
OP = ROWS_OF = FORMAT = ROW_BYTES = SHAPES = ONE_ROW = MULTIPLY = None

PLAIN_LAYOUTS = {
    name: Layout(f"{name} panels", partial(pack, format), format.packed.arrays) for name, format in FORMATS.items()
}
LAYOUTS = PLAIN_LAYOUTS | {
    name: Layout(f"{name} dense panels", partial(pack_dense, format), ("codes", "d"))
    for name, format in FORMATS.items()
    if format.dense is not None
}


def constants(format):
    """The constants of a variant that follow from its format of weights."""
    return dict(FORMAT=format.name, ROW_BYTES=format.product.rows.num_bytes, SHAPES=shapes_of(format))


def shapes_of(format, target=TARGET):
    """(the most rows that are one tile of a panel; the fewest and the most rows of the tiles that many rows are cut
    into, and their panels)."""
    panels = target.panels
    few = format.narrow_rows if panels == 1 else format.few_rows
    if target.whole_tile and format.product.rows is QUANTIZED:
        return few, WHOLE_FEWEST, target.whole_tile, panels
    if format.unpacked_on(target):  # more than 2 * few rows are three tiles or more, none of them low
        return few, MIN_ROWS + 1, MAX_ROWS, panels
    if panels == 1:
        return few, min(MIN_ROWS, few // 2), few, panels
    if format.tall_tiles:
        return MAX_ROWS, MAX_ROWS, panels * MAX_ROWS, 1
    return few, MIN_ROWS, MAX_ROWS, panels


@merged
def multiply_rows(format, shapes, x, w, out, ahead, num_rows):
    """COLS panels by num_rows rows, as one tile (of few rows) or in tiles of nearly equal height. shapes: see
    `shapes_of`; the other arguments are those of `linear_tile`.

    The first tile prefetches the panels ahead; where there are several tiles, each of the first two prefetches half.
    Where there are several tiles of a dense layout, or of codes that take long to unpack, the first unpacks its panels
    for the others.
    """
    few, fewest, most, at_once = shapes
    dense, unpacks = is_dense(format, w.scales), unpacked_bytes(format, w.K) > 0
    tallest = DENSE_HEIGHTS[1] if dense else most
    prefetched = ALL_PANELS if num_rows <= tallest else ALL_PANELS // 2
    left = ALL_PANELS - prefetched
    if dense:
        if num_rows <= FEW_ROWS_DENSE:
            linear_tile((format, "dense"), ((1, FEW_ROWS_DENSE), COLS, 1), num_rows, x, w, out, ahead)
            return
        rows = num_rows
        if num_rows > tallest:
            rows = tile_rows(num_rows, min(most, tallest))  # no taller tile unpacks
            w = Panels(w.codes, w.codes_stride, w.scales, w.scales_stride, w.K, stack_memory(UNPACKED_BYTES))
        linear_tile((format, "dense"), (DENSE_HEIGHTS, COLS, COLS), rows, x, w, out, only(ahead, prefetched))
        num_rows, x, out = num_rows - rows, x_below(x, rows), below(out, rows)
        prefetched, left = left, 0
        w = Panels(w.unpacked, panel_bytes(format, w.K, 0), 0, 0, w.K, 0)
    elif num_rows <= few_rows(format, shapes):
        while num_rows > 0:
            rows = tile_rows(num_rows, few)
            linear_tile((format, "plain"), ((1, few), COLS, 1), rows, x, w, out, ahead)
            num_rows, x, out = num_rows - rows, x_below(x, rows), below(out, rows)
    elif unpacks:
        w = Panels(w.codes, w.codes_stride, w.scales, w.scales_stride, w.K, stack_memory(UNPACKED_BYTES))
        rows = tile_rows(num_rows, most)
        linear_tile((format, "unpacking"), ((fewest, most), COLS, at_once), rows, x, w, out, only(ahead, prefetched))
        num_rows, x, out = num_rows - rows, x_below(x, rows), below(out, rows)
        prefetched, left = left, 0
    while num_rows > 0:
        rows = tile_rows(num_rows, most)
        linear_tile((format, "last"), ((fewest, most), COLS, at_once), rows, x, w, out, only(ahead, prefetched))
        num_rows, x, out = num_rows - rows, x_below(x, rows), below(out, rows)
        prefetched, left = left, 0


@inlined
def few_rows(format, shapes):
    """Up to how many rows are multiplied in tiles of one panel: in two of these, where more rows unpack their codes. No
    more than two tiles of many rows would have, where these have one panel, too."""
    few, _, most, panels = shapes
    return 2 * (most if panels == 1 else few) if unpacked_bytes(format, K_UNIT) > 0 else few


@inlined
def tile_rows(num_rows, most):
    """Rows of the next tile, where the rows left are cut into tiles of nearly equal height, at most `most`."""
    num_tiles = (num_rows + most - 1) // most
    return (num_rows + num_tiles - 1) // num_tiles


@inlined
def only(ahead, panel_mask):
    """The Ahead of which other panels are prefetched."""
    return Ahead(ahead.codes, ahead.codes_stride, ahead.scales, ahead.scales_stride, panel_mask)


@inlined
def x_below(x, rows):
    """The Rows that begin `rows` rows further down."""
    return Rows(x.address + rows * x.stride, x.stride)


@inlined
def below(out, rows):
    """The Output that begins `rows` rows further down."""
    address, added = out.address + rows * out.stride, out.added + rows * out.added_stride if out.added else 0
    return Output(address, out.stride, added, out.added_stride, out.num_panels, out.resume, out.is_last)


@merged
def multiply_one_row(format, shapes, x, w, out, ahead, num_rows):
    """COLS panels by one row: `multiply_rows` for num_rows = 1, without prefetch."""
    if is_dense(format, w.scales):
        linear_tile((format, "dense"), ((1, 1), COLS, 1), 1, x, w, out, only(ahead, 0))
    else:
        linear_tile((format, "plain"), ((1, 1), COLS, 1), 1, x, w, out, only(ahead, 0))


@inlined
def cache_of(format):
    """How many bytes of activations stay in the second-level cache while plain panels of a format pass by."""
    return UNPACKING_CACHE_BYTES if unpacked_bytes(format, K_UNIT) > 0 else CACHE_BYTES


@inlined
def rows_at_once(row_bytes, cache_bytes=CACHE_BYTES):
    """How many rows of row_bytes bytes stay in the second-level cache while panels pass by."""
    return max(MAX_ROWS, cache_bytes // row_bytes // MAX_ROWS * MAX_ROWS)


@inlined
def evenly(num_rows, most):
    """Rows of a share, where rows are dealt in as few shares of at most `most` as can be: nearly equal, whole tiles."""
    num_shares = (num_rows + most - 1) // most
    return ((num_rows + num_shares - 1) // num_shares + MAX_ROWS - 1) // MAX_ROWS * MAX_ROWS


@inlined
def claim_size(num_panels, num_threads, num_rows):
    """How many panels a thread claims at a time: enough claims to balance the work, few enough for long streams."""
    size = num_panels // ((CLAIMS_FEW_ROWS if num_rows <= 2 * MAX_ROWS else CLAIMS_MANY_ROWS) * num_threads)
    return max(2, min(MAX_CLAIM, size - size % 2))


@inlined
def of_one_panel(num_panels, num_threads):
    """Whether claims of one panel end earlier than claims of two: where there are hardly more panels than threads."""
    pairs = (num_panels + 1) // 2
    return 2 * ((pairs + num_threads - 1) // num_threads) > (num_panels + num_threads - 1) // num_threads


@inlined
def rows_of_claim(num_rows, num_claims, num_threads):
    """How many rows a claim has, where num_claims runs of panels share num_rows rows: all of them, unless this makes
    too few claims. Rows are cut at the height of the tallest tiles."""
    num_shares = (ENOUGH_CLAIMS * num_threads + num_claims - 1) // num_claims
    num_shares = max(1, min(num_shares, num_rows // LEAST_ROWS))
    height = 2 * MAX_ROWS
    share = ((num_rows + num_shares - 1) // num_shares + height - 1) // height * height
    return max(1, num_rows if num_shares == 1 else share)


@inlined
def part_of_k(format, shapes, w, num_rows):
    """How much of K is worked on at a time, so that the panels of a tile stay near for all rows. w: `Panels`."""
    few = DENSE_HEIGHTS[1] if is_dense(format, w.scales) else few_rows(format, shapes)
    panel = max(w.codes_stride, unpacked_bytes(format, w.K))
    part = NEAR_BYTES * w.K // (COLS * panel) // K_UNIT * K_UNIT
    return w.K if num_rows <= few else min(w.K, max(K_UNIT, part))


@inlined
def whole_rows(a, row_bytes, p):
    """The rows of x that panel p multiplies; row_bytes: of in_features values."""
    return Rows(a.x, row_bytes)


@inlined
def rows_of_group(a, row_bytes, p):
    """The same where each group of panels multiplies its own values; the values of the groups lie side by side."""
    return Rows(a.x + row_bytes * (16 * p // (a.out_features // a.groups)), row_bytes * a.groups)


class Sizes(NamedTuple):
    """Sizes of a layer: bytes of in_features values of x and of a panel; how many rows are worked on at a time."""

    row_bytes: int
    panel_bytes: int
    rows_at_once: int


class Claim(NamedTuple):
    """Rows first_row .. end_row - 1 by panels first_panel .. end_panel - 1; next_panel: the first of the next claim."""

    first_row: int
    end_row: int
    first_panel: int
    end_panel: int
    next_panel: int


@inlined
def output_at(a, t, p, end_panel):
    """The Output of a layer at row t and panels p .. end_panel - 1, for all of K."""
    place, stride = 4 * (a.width * t + a.column + 16 * p), 4 * a.width
    return Output(a.out + place, stride, a.residual + place if a.residual else 0, stride, end_panel - p, 0, 1)


@merged
def multiply_parts(format, shapes, multiply, x, w, out, ahead, num_rows):
    """COLS panels by num_rows rows, a part of K at a time. multiply: makes the tiles, as `multiply_rows`; the other
    arguments are those of `linear_tile`, for all of K."""
    K, part = w.K, part_of_k(format, shapes, w, num_rows)
    for k in range(0, K, part):
        next_k, is_last = k + part, k + part >= K
        codes, scales = w.codes + w.codes_stride * k // K, w.scales + scale_offset(format, k) if w.scales else 0
        codes_ahead, scales_ahead = ahead.codes, ahead.scales
        if not is_last:
            codes_ahead = w.codes + w.codes_stride * next_k // K
            scales_ahead = w.scales + scale_offset(format, next_k) if w.scales else 0
        multiply(
            format,
            shapes,
            Rows(x.address + row_offset(format, k), x.stride),
            Panels(codes, w.codes_stride, scales, w.scales_stride, min(part, K - k), 0),
            Output(
                out.address,
                out.stride,
                out.added if is_last else 0,
                out.added_stride,
                out.num_panels,
                k,
                1 if is_last else 0,
            ),
            Ahead(codes_ahead, ahead.codes_stride, scales_ahead, ahead.scales_stride, ahead.panel_mask),
            num_rows,
        )


@merged
def multiply_claim(format, shapes, multiply, rows_of, a, sizes, claim):
    """Computes a claim of the layer `a`, some rows at a time. multiply: makes the tiles, as
    `multiply_rows`; rows_of: finds the rows of a panel, as `whole_rows`."""
    codes, scales, stride = a.weight.codes, a.weight.d, sizes.panel_bytes
    scale_stride = scale_bytes(format, a.in_features) if scales else 0
    for t in range(claim.first_row, claim.end_row, sizes.rows_at_once):
        panel_after = claim.first_panel if t + sizes.rows_at_once < claim.end_row else claim.next_panel
        for p in range(claim.first_panel, claim.end_panel, COLS):
            next_p = p + COLS if p + COLS < claim.end_panel else panel_after
            multiply_parts(
                format,
                shapes,
                multiply,
                x_below(rows_of(a, sizes.row_bytes, p), t),
                Panels(codes + stride * p, stride, scales + scale_stride * p, scale_stride, a.in_features, 0),
                output_at(a, t, p, claim.end_panel),
                Ahead(codes + stride * next_p, stride, scales + scale_stride * next_p, scale_stride, ALL_PANELS),
                min(sizes.rows_at_once, claim.end_row - t),
            )


def linear(op, step, thread, num_threads):
    """The thread's share of a linear layer.

    A claim is a run of panels by all rows, by some, where there are many threads, or, with ONE_ROW, by one. A thread
    takes its next claim before it works on the one at hand, so that the first panels of the next claim can be
    prefetched.
    """
    a, T = OP.read(op), num_rows(op, step)
    K, num_panels, together = a.in_features, (a.out_features + 15) // 16, 1 if ONE_ROW else T
    row_bytes, panel = ROW_BYTES(K), panel_bytes(FORMAT, K, a.weight.d)
    one_by_one, cache_bytes = SHAPES[0], cache_of(FORMAT)
    if is_dense(FORMAT, a.weight.d):
        one_by_one, cache_bytes = FEW_ROWS_DENSE, UNPACKING_CACHE_BYTES
    size = claim_size(num_panels, num_threads, together)
    if size == 2 and together <= one_by_one and of_one_panel(num_panels, num_threads):
        size = 1
    num_claims, counter = (num_panels + size - 1) // size, peek(op + 8 * COUNTER, int64)
    claim_rows = 1 if ONE_ROW else rows_of_claim(T, num_claims, num_threads)
    at_once = evenly(min(T, claim_rows), rows_at_once(row_bytes, cache_bytes))
    sizes = Sizes(row_bytes, panel, at_once)
    number, next_number = fetch_add(counter, 1), fetch_add(counter, 1)
    while number // num_claims * claim_rows < T:
        first_row, run = number // num_claims * claim_rows, neighbouring(number % num_claims, num_claims, num_threads)
        end_row, end_panel = min(first_row + claim_rows, T), min(run * size + size, num_panels)
        next_run = neighbouring(next_number % num_claims, num_claims, num_threads)
        claim = Claim(first_row, end_row, run * size, end_panel, next_run * size)
        multiply_claim(FORMAT, SHAPES, MULTIPLY, ROWS_OF, a, sizes, claim)
        number, next_number = next_number, fetch_add(counter, 1)


CPU, PER_TOKEN = {}, {}  # in PER_TOKEN every row reads all weights anew, with the one-row tile of CPU
for _name, _format in FORMATS.items():
    for _op, _rows_of in ((Linear, whole_rows), (GroupedLinear, rows_of_group)):
        for _table, _multiply, _suffix in ((CPU, multiply_rows, ""), (PER_TOKEN, multiply_one_row, "_per_token")):
            _kind = f"{_op.name()}_{_name}"
            _constants = constants(_format) | dict(OP=_op, ROWS_OF=_rows_of, ONE_ROW=_table is PER_TOKEN)
            globals()[_kind + _suffix] = variant(linear, _kind + _suffix, MULTIPLY=_multiply, **_constants)
            _kernel = globals()[_kind + _suffix]
            _table[_kind] = Implementation(_kernel, LAYOUTS[_name], flushes=needs_flushing(_format))
