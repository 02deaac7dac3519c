"""One block of keys against a tile of query rows: scores, softmax step, values. The inner part of the fast attention.

A tile's rows are the query heads of one kv head for some consecutive tokens, so that a block of K and V is read from
memory once for all of them. A page is worked on where it lies (ops/kv_cache.py), row by row: a row of K is a dimension
of 64 keys, a row of V all dimensions of a key; of bfloat16 two dimensions or two keys, in pairs. A step multiplies
16-lane columns of such a row by one number, or one pair, of every query row. Scratch memory, on the thread's stack:

    q [ROWS, 256] scaled queries    o [ROWS, 256] sums of values    p [ROWS, 64] scores    w [ROWS, 64] weights
    lane [ROWS, 16] sums of weights    top [ROWS] largest score    scales [2, 64] of a block's keys and values, if any

Few, large functions: each level of nesting compiles everything below it again.
"""

from collections import namedtuple

import numpy as np
from numba import float32, int32

from lockstep.ops.activations import NATIVE_BF16
from lockstep.ops.attention_math import BLOCK, SPAN, ZERO, Block, cleared, exp2, first_key, score_scales, soft_capped
from lockstep.runtime.kernel import inlined
from lockstep.runtime.machine import prefetch
from lockstep.runtime.simd import (
    lane_numbers,
    lanes,
    load,
    max_lanes,
    maximum,
    peek,
    poke,
    round_bf16,
    store,
    store_bf16,
    to_f32,
    where_below,
)
from lockstep.runtime.targets import wide_registers
from lockstep.runtime.tiles import tile_fma_f32, tile_load, tile_pairs, tile_store, tile_zeros

HEIGHT, COLS = (6, 2) if wide_registers() else (5, 1)  # HEIGHT x COLS x 16 lanes of accumulators fill the registers
FEW_COLS = 4 if wide_registers() else 2  # of two rows: lines in the order in which they lie, and registers to spare
ROWS, FEW_ROWS = 96, 8  # of a tile at most; few rows are bound by the read of K and V
MASKED = np.float32(-np.inf)  # below any score, even one that overflows
MAX_HEAD_DIM = 256
ROW_BYTES, P_BYTES, LANE_BYTES = 4 * MAX_HEAD_DIM, 4 * BLOCK, 64
K_ROW_BYTES = 4 * BLOCK  # of a K page, in either format; of a V page they are 4 * head_dim
PAIR_BYTES = 4 if NATIVE_BF16 else 8  # of a query or weight: without an instruction for pairs they are kept as float32
ALL = -1  # mask of both halves of a pair
Q = 0
O = Q + ROWS * ROW_BYTES
P = O + ROWS * ROW_BYTES
W = P + ROWS * P_BYTES
LANE = W + ROWS * P_BYTES
TOP = LANE + ROWS * LANE_BYTES
SCALES = TOP + 4 * ROWS
SCRATCH_BYTES = SCALES + 8 * BLOCK

# group: query heads of the tile, the first of them `head`; table: address of the request's page ids
Tile = namedtuple("Tile", "token tokens position head group kv_head table")
# one row, or two that are worked on together (next: 1, else 0), from dimension `done` on
Pair = namedtuple("Pair", "row next done")
# how pages of a type are multiplied. each: numbers of a reduction that a step takes; step: as `single_step`; keep: how
# queries and weights are stored for it, as `keep_single`
Arithmetic = namedtuple("Arithmetic", "each step keep")


@inlined
def single_step(acc, x, x_row, columns, mask):
    """acc[r, c] = fma(x[r], columns[c], acc[r, c]) for one row of a float32 page."""
    return tile_fma_f32(acc, x, x_row, columns, 64)


@inlined
def pair_step(acc, x, x_row, columns, mask):
    """The same for one row of pairs; mask: which halves of the page's pairs count, the others are zero."""
    return tile_pairs(acc, x, x_row, columns, 64, mask)


@inlined
def keep_single(place, i, x):
    """Element i..i + 15 of a row of queries or weights; returns what is kept."""
    store(place + 4 * i, x)
    return x


@inlined
def keep_pairs(place, i, x):
    """The same, rounded to bfloat16."""
    x = round_bf16(x)
    if NATIVE_BF16:
        store_bf16(place + 2 * i, x)
    else:
        store(place + 4 * i, x)
    return x


SINGLE, PAIRS = Arithmetic(1, single_step, keep_single), Arithmetic(2, pair_step, keep_pairs)


@inlined
def load_queries(a, tile, how, memory):
    """The tile's queries, scaled, one row after the other."""
    scale, _ = score_scales(a.scale, a.soft_cap)
    for row in range(tile.tokens * tile.group):
        token, head = tile.token + row // tile.group, tile.head + row % tile.group
        source = a.q + 4 * a.head_dim * (a.num_heads * token + head)
        for d in range(0, a.head_dim, 16):
            how.keep(memory + Q + ROW_BYTES * row, d, cleared(load(source + 4 * d) * scale))


@inlined
def blocks_of(a, tile, span):
    """The first and the last block of a span that the tile sees any key of."""
    first = max(first_key(tile.position, a.window), span * SPAN) // BLOCK
    return first, min(tile.position + tile.tokens - 1, (span + 1) * SPAN - 1) // BLOCK


@inlined
def rows_that_see(a, tile, block):
    """A block by its number, with the rows that see any of its keys."""
    start, last = block * BLOCK, tile.tokens
    if a.window > 0:
        last = min(last, start + BLOCK - 1 + a.window - tile.position)
    return Block(start, max(0, start - tile.position) * tile.group, last * tile.group)


@inlined
def attend_span(a, tile, span, how, memory):
    """Adds the blocks of one span to the rows that see any of their keys.

    While few rows work on a block's keys, its values come from memory, and then the next block's keys.
    """
    first_block, last_block = blocks_of(a, tile, span)
    size = 4 // how.each * BLOCK * a.head_dim
    ahead = size * (np.int64(peek(tile.table + 4 * first_block, int32)) * a.num_kv_heads + tile.kv_head)
    for number in range(first_block, last_block + 1):
        block, page = rows_that_see(a, tile, number), ahead
        next_page = np.int64(peek(tile.table + 4 * min(number + 1, last_block), int32))
        ahead = size * (next_page * a.num_kv_heads + tile.kv_head)
        scores(a, tile, block, a.k_pages + page, a.v_pages + page, how, memory)
        softmax_step(a, tile, block, how, memory)
        values(a, tile, block, a.v_pages + page, a.k_pages + ahead, how, memory)


@inlined
def scores(a, tile, block, k, ahead, how, memory):
    """q . k of the block's rows and the slots that any of them sees: HEIGHT rows at a time, then two by two.

    A row without a partner is its own. Of few rows the first two ask for the lines of V at `ahead`, in order and into
    the second-level cache: otherwise the memory gives half its speed.
    """
    start, first, last = block
    steps, x_bytes, step = a.head_dim // how.each, 4 if how.each == 1 else PAIR_BYTES, how.step
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    for row in range(first, high, HEIGHT):
        q = memory + Q + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // tile.group + 1 - start), 16 * COLS):
            acc = tile_zeros(HEIGHT, COLS)
            for i in range(steps):
                acc = step(acc, q + x_bytes * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, ALL)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, last, 2):
        pair, q, asked = 1 if row + 1 < last else 0, memory + Q + ROW_BYTES * row, ahead if row == first else k
        for j in range(0, min(BLOCK, tile.position + (row + pair) // tile.group + 1 - start), 16 * FEW_COLS):
            two = tile_zeros(2, FEW_COLS)
            for i in range(steps):
                two = step(two, q + x_bytes * i, ROW_BYTES * pair, k + K_ROW_BYTES * i + 4 * j, ALL)
                for line in range(FEW_COLS):
                    prefetch(asked + 4 * j * steps + 64 * (FEW_COLS * i + line))
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * pair, FEW_COLS)


@inlined
def softmax_step(a, tile, block, how, memory):
    """Turns scores into weights, with the sums so far brought to the new maximum."""
    for row in range(block.first, block.last):
        p, weights = memory + P + P_BYTES * row, memory + W + P_BYTES * row
        higher, total = raise_maximum(a, tile, block.start, row, memory)
        for j in range(0, BLOCK, 16):
            total = total + how.keep(weights, j, exp2(load(p + 4 * j) - higher))
        store(memory + LANE + LANE_BYTES * row, total)


@inlined
def raise_maximum(a, tile, start, row, memory):
    """Caps and masks a row's scores, and brings its sums so far to the new maximum; returns that and the sums of
    weights."""
    position, p, o = tile.position + row // tile.group, memory + P + P_BYTES * row, memory + O + ROW_BYTES * row
    top, (_, cap) = memory + TOP + 4 * row, score_scales(a.scale, a.soft_cap)
    if cap > ZERO:
        for i in range(0, P_BYTES, 64):
            store(p + i, soft_capped(load(p + i), cap))
    low, high = first_key(position, a.window) - start, position + 1 - start
    if low > 0 or high < BLOCK:
        for j in range(0, BLOCK, 16):
            slot = to_f32(lane_numbers()) + np.float32(j)
            seen = where_below(slot, np.float32(high), load(p + 4 * j), lanes(MASKED))
            store(p + 4 * j, where_below(slot, np.float32(low), lanes(MASKED), seen))
    higher = max_lanes(maximum(maximum(load(p), load(p + 64)), maximum(load(p + 128), load(p + 192)))) + ZERO
    total = lanes(ZERO)
    if start % SPAN == 0 or (low >= 0 and a.window > 0):  # the row's first block of the span
        for i in range(0, 4 * a.head_dim, 64):
            store(o + i, total)
    else:
        before, total = peek(top, float32), load(memory + LANE + LANE_BYTES * row)
        if higher > before:
            shrink = exp2(before - higher)
            total = cleared(total * shrink)
            for i in range(0, 4 * a.head_dim, 64):
                store(o + i, cleared(load(o + i) * shrink))
        else:  # the factor is exactly 1
            higher = before
    poke(top, higher)
    return higher, total


@inlined
def values(a, tile, block, v, ahead, how, memory):
    """o += w . v of the block's rows: HEIGHT rows at a time where all see the whole block, others by `ragged_values`.

    A slot that a row does not see must not reach it, not even as 0 * v: v may be anything there.
    """
    (start, first, last), each, step = block, how.each, how.step
    whole, end, x_bytes = first, last, 4 if each == 1 else PAIR_BYTES
    if start + BLOCK - 1 > tile.position:  # rows from `whole` to `end` see all slots
        whole = max(first, (start + BLOCK - 1 - tile.position) * tile.group)
    if a.window > 0:
        end = min(last, (start + a.window - tile.position) * tile.group)
    high = whole + max(0, end - whole) // HEIGHT * HEIGHT if last - first > FEW_ROWS else whole
    wide = a.head_dim // (16 * COLS) * (16 * COLS)
    for d in range(0, wide, 16 * COLS):
        for row in range(whole, high, HEIGHT):
            o = memory + O + ROW_BYTES * row + 4 * d
            acc = tile_load(HEIGHT, COLS, o, ROW_BYTES)
            for i in range(BLOCK // each):
                acc = step(acc, memory + W + P_BYTES * row + x_bytes * i, P_BYTES, v + 4 * (a.head_dim * i + d), ALL)
            tile_store(acc, o, ROW_BYTES, COLS)
    row = first
    while row < last:
        inside = whole <= row < high
        same_token = row + 1 < last and (row + 1) // tile.group == row // tile.group
        pair, done = 1 if same_token and (row + 1 < high or not inside) else 0, wide if inside else 0
        if not inside or wide < a.head_dim:
            ragged_values(a, tile, start, Pair(row, pair, done), v, ahead if row == first else v, how, memory)
        row += 1 + pair


@inlined
def ragged_values(a, tile, start, two_rows, v, ahead, how, memory):
    """o += w . v of a Pair of rows that see the same slots of the block at `start`; only these slots are visited.

    What lies at `ahead` is asked for meanwhile.
    """
    (row, pair, done), each, step = two_rows, how.each, how.step
    position, x_bytes = tile.position + row // tile.group, 4 if each == 1 else PAIR_BYTES
    weights, o, width = memory + W + P_BYTES * row, memory + O + ROW_BYTES * row, 4 * a.head_dim
    low, high = max(0, first_key(position, a.window) - start), min(BLOCK, position + 1 - start)
    wide = done + (a.head_dim - done) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(done, wide, 16 * FEW_COLS):
        two = tile_load(2, FEW_COLS, o + 4 * d, ROW_BYTES * pair)
        for i in range(low // each, (high + each - 1) // each):
            two = step(two, weights + x_bytes * i, P_BYTES * pair, v + width * i + 4 * d, halves(each * i, low, high))
            for line in range(FEW_COLS):
                prefetch(ahead + 4 * BLOCK // each * d + 64 * (FEW_COLS * i + line))
        tile_store(two, o + 4 * d, ROW_BYTES * pair, FEW_COLS)
    for d in range(wide, a.head_dim, 16):
        one = tile_load(2, 1, o + 4 * d, ROW_BYTES * pair)
        for i in range(low // each, (high + each - 1) // each):
            one = step(one, weights + x_bytes * i, P_BYTES * pair, v + width * i + 4 * d, halves(each * i, low, high))
        tile_store(one, o + 4 * d, ROW_BYTES * pair, 1)


@inlined
def halves(slot, low, high):
    """Mask of a pair that begins at an even slot: the half of a slot outside low..high is not to be read."""
    return (0xFFFF if slot >= low else 0) | (-65536 if slot + 1 < high else 0)
