"""The online softmax of the fast attention kernels: a tile of query rows over the blocks of a span, for every layout.

A tile's rows are the query heads that share a kv head (a "unit" of heads), for one or more units and some consecutive
tokens. The rows of a unit lie together, so that a block of K and V is read from memory once for all of them. How the
pages of one type are worked on is told by a `Layout`. Scratch memory, on the thread's stack:

    q [ROWS, ROW_BYTES] scaled queries    o [ROWS, ROW_BYTES] sums of values    p [ROWS, 64] scores, then weights
    lane [ROWS, 16] sums of weights    top [ROWS] largest score    own: scratch memory of the layout

Functions are few and large: each level of nesting compiles everything below it again.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined, merged
from lockstep.native.numbers import float32
from lockstep.native.simd import lane_numbers, lanes, load, max_lanes, maximum, peek, poke, store, to_f32, where_below
from lockstep.ops.attention.formulas import BLOCK, MAX_HEAD_DIM, SPAN, ZERO, cleared, exp2, first_key, soft_capped

ROWS, SPARE_ROWS = 96, 6  # the most rows of a tile, and the rows after them that a register tile may load
MASKED = np.float32(-np.inf)  # below any score, even one that overflows
ROW_BYTES = 4 * MAX_HEAD_DIM + 64  # an odd number of cache lines: rows do not all fall into the same sets of a cache
P_BYTES, LANE_BYTES = 4 * BLOCK, 64  # of a row of p and of lane
Q = 0
O = Q + (ROWS + SPARE_ROWS) * ROW_BYTES
P = O + (ROWS + SPARE_ROWS) * ROW_BYTES
LANE = P + (ROWS + SPARE_ROWS) * P_BYTES
TOP = LANE + ROWS * LANE_BYTES
OWN = TOP + 4 * ROWS


class Tile(NamedTuple):
    """Some consecutive tokens of a sequence with one or more units of heads.

    token: row of the first token in q and out; position: its position in the sequence. unit: number of the first unit,
    each of which has call.unit_heads query heads. table: address of the sequence's page ids.
    """

    token: int
    num_tokens: int
    position: int
    unit: int
    num_units: int
    table: int


class Block(NamedTuple):
    """A block of 64 keys: the position of its first key, and the rows of a unit, first_row .. end_row - 1, that see any
    of its keys."""

    start: int
    first_row: int
    end_row: int


class Head(NamedTuple):
    """The keys and values of one kv head in a block, for one unit. place: of the block, as `Layout.place_of` gives it;
    first_row: the unit's first row in the tile."""

    place: int
    kv_head: int
    first_row: int


class Layout(NamedTuple):
    """How the pages of one type are worked on.

    store_query: stores sixteen numbers of a scaled query; finish_query: is called once a query is complete; place_of:
    where a block lies; scores: a unit's products of queries and keys, to p; scale_scores: makes scores of a row's
    products; weigh: makes weights of a row's scores and adds them to the sums of weights; add_values: adds weights
    times values to o. arithmetic: an argument of these functions, of the layout's own type, or 0.
    """

    store_query: Callable
    finish_query: Callable
    place_of: Callable
    scores: Callable
    scale_scores: Callable
    weigh: Callable
    add_values: Callable
    arithmetic: object


@inlined
def kv_head_of(call, unit):
    """The kv head that a unit of heads reads: each unit has one, or several units share one."""
    one_each = call.num_heads == call.unit_heads * call.num_kv_heads
    return unit if one_each else unit * call.unit_heads // (call.num_heads // call.num_kv_heads)


@inlined
def block_at(call, tile, number):
    """The Block of a number, counted from the start of the sequence."""
    start, end_token = number * BLOCK, tile.num_tokens
    if call.window > 0:
        end_token = min(end_token, start + BLOCK - 1 + call.window - tile.position)
    return Block(start, max(0, start - tile.position) * call.unit_heads, end_token * call.unit_heads)


@merged
def attend_span(call, layout, tile, span, last_span, memory):
    """Adds the blocks of one span to the rows that see any of their keys.

    While a unit's keys and values are worked on, the next ones are prefetched: another unit's, or the next block's.
    last_span: the last span of the tile that the thread works on, to which prefetching goes on.
    """
    first, seen = max(first_key(tile.position, call.window), span * SPAN) // BLOCK, tile.position + tile.num_tokens - 1
    last, last_ahead = min(seen, (span + 1) * SPAN - 1) // BLOCK, min(seen, (last_span + 1) * SPAN - 1) // BLOCK
    place, unit_rows = layout.place_of(call, tile, first, memory), tile.num_tokens * call.unit_heads
    for number in range(first, last + 1):
        block = block_at(call, tile, number)
        next_place = layout.place_of(call, tile, min(number + 1, last_ahead), memory)
        for unit in range(tile.num_units):
            head, more = Head(place, kv_head_of(call, tile.unit + unit), unit * unit_rows), unit + 1 < tile.num_units
            place_ahead = place if more else next_place
            next_head = Head(place_ahead, kv_head_of(call, tile.unit + (unit + 1 if more else 0)), 0)
            layout.scores(call, layout.arithmetic, tile, block, head, next_head, memory)
            softmax_step(call, layout, tile, block, head.first_row, memory)
            layout.add_values(call, layout.arithmetic, tile, block, head, next_head, memory)
        place = next_place


@inlined
def softmax_step(call, layout, tile, block, unit_row, memory):
    """Turns scores into weights, and rescales the sums so far to the new maximum. unit_row: the unit's first row."""
    for row in range(block.first_row, block.end_row):
        p = memory + P + P_BYTES * row
        layout.scale_scores(call, p, unit_row + row, memory)
        higher, sums = raise_maximum(call, tile, block.start, row, unit_row, memory)
        store(memory + LANE + LANE_BYTES * (unit_row + row), layout.weigh(layout.arithmetic, p, higher, sums, memory))


@inlined
def raise_maximum(call, tile, start, row, unit_row, memory):
    """Caps and masks a row's scores, and rescales its sums so far to the new maximum; returns the new maximum and the
    sixteen sums of weights."""
    position, p, tile_row = tile.position + row // call.unit_heads, memory + P + P_BYTES * row, unit_row + row
    o, top, lane = memory + O + ROW_BYTES * tile_row, memory + TOP + 4 * tile_row, memory + LANE + LANE_BYTES * tile_row
    if call.cap > ZERO:
        for i in range(0, P_BYTES, 64):
            store(p + i, soft_capped(load(p + i), call.cap))
    low, high = first_key(position, call.window) - start, position + 1 - start
    if low > 0 or high < BLOCK:
        for j in range(0, BLOCK, 16):
            slot = to_f32(lane_numbers()) + np.float32(j)
            seen = where_below(slot, np.float32(high), load(p + 4 * j), lanes(MASKED))
            store(p + 4 * j, where_below(slot, np.float32(low), lanes(MASKED), seen))
    higher = max_lanes(maximum(maximum(load(p), load(p + 64)), maximum(load(p + 128), load(p + 192)))) + ZERO
    sums = lanes(ZERO)
    if start % SPAN == 0 or (low >= 0 and call.window > 0):  # the row's first block of the span
        for i in range(0, 4 * call.head_dim, 64):
            store(o + i, sums)
    else:
        before, sums = peek(top, float32), load(lane)
        if higher > before:
            shrink = exp2(before - higher)
            sums = cleared(sums * shrink)
            for i in range(0, 4 * call.head_dim, 64):
                store(o + i, cleared(load(o + i) * shrink))
        else:  # the factor is exactly 1
            higher = before
    poke(top, higher)
    return higher, sums


@inlined
def products_are_scores(call, p, row, memory):
    """`Layout.scale_scores` where products are scores already."""


@inlined
def query_is_finished(call, row, memory):
    """`Layout.finish_query` where nothing is left to do."""
