"""The online softmax of the fast attention: a tile of query rows over the blocks of a span. Once for every page layout.

A tile's rows are the query heads that share a kv head (a "unit" of heads), for one or more units and some consecutive
tokens; rows of a unit lie together, so that a block of K and V is read from memory once for all of them. What is done
with a block, and how, a `Layout` tells for its pages. Scratch memory, on the thread's stack:

    q [ROWS, ROW_BYTES] scaled queries    o [ROWS, ROW_BYTES] sums of values    p [ROWS, 64] scores, then weights
    lane [ROWS, 16] sums of weights    top [ROWS] largest score    own: what a layout needs for itself

Few, large functions: each level of nesting compiles everything below it again.
"""

from collections import namedtuple

import numpy as np

from lockstep.native.kernel import inlined, merged
from lockstep.native.numbers import float32
from lockstep.native.simd import lane_numbers, lanes, load, max_lanes, maximum, peek, poke, store, to_f32, where_below
from lockstep.ops.attention.formulas import BLOCK, MAX_HEAD_DIM, SPAN, ZERO, cleared, exp2, first_key, soft_capped

ROWS, SPARE_ROWS = 96, 6  # of a tile at most; more that a register tile may load past its end
MASKED = np.float32(-np.inf)  # below any score, even one that overflows
ROW_BYTES = 4 * MAX_HEAD_DIM + 64  # an odd number of cache lines: rows do not all fall into the same sets of a cache
P_BYTES, LANE_BYTES = 4 * BLOCK, 64
Q = 0
O = Q + (ROWS + SPARE_ROWS) * ROW_BYTES
P = O + (ROWS + SPARE_ROWS) * ROW_BYTES
LANE = P + (ROWS + SPARE_ROWS) * P_BYTES
TOP = LANE + ROWS * LANE_BYTES
OWN = TOP + 4 * ROWS

# units: kv heads of the tile, each with c.unit_heads query heads, the first of them `unit`; table: address of the
# sequence's page ids
Tile = namedtuple("Tile", "token tokens position unit units table")
# a block of keys and the rows of a unit that see any of them. start: position of its first key; rows first..last
Block = namedtuple("Block", "start first last")
# one unit's keys or values of a block. place: as Layout.place gives it; g: the kv head; base: the unit's first row
Head = namedtuple("Head", "place g base")
# How pages of a type are worked on. keep_query: keeps sixteen numbers of a scaled query; end_query: what is done with a
# query once it is complete; place: where a block is; scores: a unit's products of queries and keys, to p; scaled: what
# makes scores of a row's products; weigh: a row's weights, which it adds to the sums of weights; values: the sums of
# weights times values, added to o. how: whatever else these functions want to be told.
Layout = namedtuple("Layout", "keep_query end_query place scores scaled weigh values how")


@inlined
def kv_head_of(c, unit):
    """The kv head that a unit of heads reads: its own, or one of several units that share it."""
    own = c.num_heads == c.unit_heads * c.num_kv_heads
    return unit if own else unit * c.unit_heads // (c.num_heads // c.num_kv_heads)


@inlined
def rows_that_see(c, tile, block):
    """A block by its number, with the rows of a unit that see any of its keys."""
    start, last = block * BLOCK, tile.tokens
    if c.window > 0:
        last = min(last, start + BLOCK - 1 + c.window - tile.position)
    return Block(start, max(0, start - tile.position) * c.unit_heads, last * c.unit_heads)


@merged
def attend_span(c, layout, tile, span, end, memory):
    """Adds the blocks of one span to the rows that see any of their keys; `end` is the last span that follows it.

    While a unit's keys and values are worked on, the next ones come from memory: another unit's, or the next block's.
    """
    first, seen = max(first_key(tile.position, c.window), span * SPAN) // BLOCK, tile.position + tile.tokens - 1
    last, until = min(seen, (span + 1) * SPAN - 1) // BLOCK, min(seen, (end + 1) * SPAN - 1) // BLOCK
    place, unit_rows = layout.place(c, tile, first, memory), tile.tokens * c.unit_heads
    for number in range(first, last + 1):
        block, next_place = rows_that_see(c, tile, number), layout.place(c, tile, min(number + 1, until), memory)
        for unit in range(tile.units):
            head, more = Head(place, kv_head_of(c, tile.unit + unit), unit * unit_rows), unit + 1 < tile.units
            ahead = place if more else next_place
            next_head = Head(ahead, kv_head_of(c, tile.unit + (unit + 1 if more else 0)), 0)
            layout.scores(c, layout.how, tile, block, head, next_head, memory)
            softmax_step(c, layout, tile, block, head.base, memory)
            layout.values(c, layout.how, tile, block, head, next_head, memory)
        place = next_place


@inlined
def softmax_step(c, layout, tile, block, base, memory):
    """Turns scores into weights, with the sums so far brought to the new maximum. base: the unit's first row."""
    for row in range(block.first, block.last):
        p = memory + P + P_BYTES * row
        layout.scaled(c, p, base + row, memory)
        higher, total = raise_maximum(c, tile, block.start, row, base, memory)
        store(memory + LANE + LANE_BYTES * (base + row), layout.weigh(layout.how, p, higher, total, memory))


@inlined
def raise_maximum(c, tile, start, row, base, memory):
    """Caps and masks a row's scores, and brings its sums so far to the new maximum; returns that and the sums of
    weights."""
    position, p, own = tile.position + row // c.unit_heads, memory + P + P_BYTES * row, base + row
    o, top, lane = memory + O + ROW_BYTES * own, memory + TOP + 4 * own, memory + LANE + LANE_BYTES * own
    if c.cap > ZERO:
        for i in range(0, P_BYTES, 64):
            store(p + i, soft_capped(load(p + i), c.cap))
    low, high = first_key(position, c.window) - start, position + 1 - start
    if low > 0 or high < BLOCK:
        for j in range(0, BLOCK, 16):
            slot = to_f32(lane_numbers()) + np.float32(j)
            seen = where_below(slot, np.float32(high), load(p + 4 * j), lanes(MASKED))
            store(p + 4 * j, where_below(slot, np.float32(low), lanes(MASKED), seen))
    higher = max_lanes(maximum(maximum(load(p), load(p + 64)), maximum(load(p + 128), load(p + 192)))) + ZERO
    total = lanes(ZERO)
    if start % SPAN == 0 or (low >= 0 and c.window > 0):  # the row's first block of the span
        for i in range(0, 4 * c.head_dim, 64):
            store(o + i, total)
    else:
        before, total = peek(top, float32), load(lane)
        if higher > before:
            shrink = exp2(before - higher)
            total = cleared(total * shrink)
            for i in range(0, 4 * c.head_dim, 64):
                store(o + i, cleared(load(o + i) * shrink))
        else:  # the factor is exactly 1
            higher = before
    poke(top, higher)
    return higher, total


@inlined
def as_they_are(c, p, row, memory):
    """`Layout.scaled` where products are scores."""


@inlined
def query_is_complete(c, row, memory):
    """`Layout.end_query` where nothing is left to do."""
