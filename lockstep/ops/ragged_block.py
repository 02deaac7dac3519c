"""One block of keys against a tile of rows, the keys wherever their pages are: the inner part of ragged attention.

A tile's rows are the query heads that share a kv head (a "unit" of heads), for one or more units and some consecutive
tokens; rows of a unit lie together. K and V are read in place, through tables of addresses with one entry for each
position of the block, each line once for all rows of a unit. Slots that no row of the tile sees are not read.
Scratch memory, on the thread's stack:

    q [ROWS, 256] scaled queries    o [ROWS, 256] sums of values    p [ROWS, 64] scores, then weights
    lane [ROWS, 16] sums of weights    top [ROWS] largest score    panels [columns / 16, rows, 16] of K or V
    tables 2 x 2 x [64] addresses: K and V of a block and of the next
"""

from collections import namedtuple

import numpy as np
from numba import float32, int32, int64

from lockstep.ops.attention_math import BLOCK, SPAN, ZERO, Block, cleared, exp2, first_key, soft_capped
from lockstep.runtime.kernel import inlined
from lockstep.runtime.simd import lanes, load, load_bf16, max_lanes, maximum, peek, poke, store
from lockstep.runtime.targets import wide_registers
from lockstep.runtime.tiles import tile_fma_f32, tile_load, tile_zeros
from lockstep.runtime.tiles_rows import (
    ask,
    tile_fma_row_bf16,
    tile_fma_row_f32,
    tile_store_rows,
    transpose_bf16,
    transpose_bf16_pairs,
    transpose_f32,
)

COLS, MORE_COLS = (2, 4) if wide_registers() else (1, 1)  # 6 x COLS or 4 x MORE_COLS accumulators fill the registers
ROWS, SPARE_ROWS = 96, 6  # of a tile at most; more that a register tile may load past its end
FEW_ROWS = 4  # rows of one token that work on V where it is: packing it would take longer
MASKED = np.float32(-np.inf)  # below any score, even one that overflows
MAX_HEAD_DIM = 256
ROW_BYTES, P_BYTES, LANE_BYTES, TABLE_BYTES = 4 * MAX_HEAD_DIM, 4 * BLOCK, 64, 8 * BLOCK
Q = 0
O = Q + (ROWS + SPARE_ROWS) * ROW_BYTES
P = O + (ROWS + SPARE_ROWS) * ROW_BYTES
LANE = P + (ROWS + SPARE_ROWS) * P_BYTES
TOP = LANE + ROWS * LANE_BYTES
PANELS = TOP + 4 * ROWS
TABLES = PANELS + 4 * BLOCK * (MAX_HEAD_DIM + 64)
SCRATCH_BYTES = TABLES + 4 * TABLE_BYTES

Tile = namedtuple("Tile", "token tokens position unit units table")
# a head's keys or values: the table of its rows' addresses, and where in each they begin, in bytes
Head = namedtuple("Head", "rows offset")


@inlined
def kv_head_of(a, unit):
    own = a.num_heads == a.unit_heads * a.num_kv_heads
    return unit if own else unit * a.unit_heads // (a.num_heads // a.num_kv_heads)


@inlined
def name_rows(a, tile, block, rows):
    """Fills two tables with the addresses of a block's rows (of kv head 0) of K and of V, if the tile sees any of them.

    Slots that no row of the tile sees must not be read: the first one that is seen stands for them.
    """
    start = block * BLOCK
    low, high = max(start, first_key(tile.position, a.window)), min(start + BLOCK, tile.position + tile.tokens)
    at, slot = tile.table + 4 * (low // a.page_size), low % a.page_size
    if low < high < low + BLOCK:
        page = np.int64(peek(at, int32))
        for j in range(BLOCK):
            poke(rows + 8 * j, a.k + a.k_page * page + a.k_slot * slot)
            poke(rows + TABLE_BYTES + 8 * j, a.v + a.v_page * page + a.v_slot * slot)
    while low < high:
        page, size, here = np.int64(peek(at, int32)), min(high - low, a.page_size - slot), rows + 8 * (low - start)
        for i in range(size):
            poke(here + 8 * i, a.k + a.k_page * page + a.k_slot * (slot + i))
            poke(here + TABLE_BYTES + 8 * i, a.v + a.v_page * page + a.v_slot * (slot + i))
        at, slot, low = at + 4, int64(0), low + size


@inlined
def attend_span(a, tile, span, memory):
    """Adds the blocks of one span to the rows that see any of their keys.

    While a unit's keys and values are worked on, the next ones come from memory: another unit's, or the next block's.
    """
    first_block = max(first_key(tile.position, a.window), span * SPAN) // BLOCK
    end_block = (tile.position + tile.tokens - 1) // BLOCK
    rows, next_rows = memory + TABLES, memory + TABLES + 2 * TABLE_BYTES
    name_rows(a, tile, first_block, rows)
    for block in range(first_block, min(end_block, (span + 1) * (SPAN // BLOCK) - 1) + 1):
        name_rows(a, tile, block + 1, next_rows)
        start, last = block * BLOCK, tile.tokens
        if a.window > 0:
            last = min(last, start + BLOCK - 1 + a.window - tile.position)
        seen = Block(start, max(0, start - tile.position) * a.unit_heads, last * a.unit_heads)
        few = seen.last - seen.first <= FEW_ROWS and seen.last - seen.first <= a.unit_heads
        for u in range(tile.units):
            g, base, more = kv_head_of(a, tile.unit + u), u * tile.tokens * a.unit_heads, u + 1 < tile.units
            ahead = rows if more or block == end_block else next_rows
            g_ahead = kv_head_of(a, tile.unit + (u + 1 if more else 0))
            o, v = memory + O + ROW_BYTES * base, Head(rows + TABLE_BYTES, a.v_head * g)
            v_ahead = Head(ahead + TABLE_BYTES, a.v_head * g_ahead)
            pack_keys(a, Head(rows, a.k_head * g), Head(ahead, a.k_head * g_ahead), memory)
            scores(a, tile, seen, memory + Q + ROW_BYTES * base, memory)
            softmax_step(a, tile, seen, base, memory)
            if few:
                row_values(a, tile, seen, v, v_ahead, o, memory)
            else:
                pack_values(a, v, v_ahead, memory)
                values(a, tile, seen, o, memory)
        rows, next_rows = next_rows, rows


@inlined
def pack_keys(a, k, next_k, memory):
    """A head's keys as panels of sixteen keys: dimension d of panel c at 64 * (c * head_dim + d); asks for next_k."""
    (rows, offset), (ahead, at_ahead) = k, next_k
    pairs = a.head_dim // 32 * 32 if a.kv_bf16 else 0
    for c in range(BLOCK // 16):
        panel, keys, due = memory + PANELS + 64 * a.head_dim * c, rows + 128 * c, ahead + 128 * c
        for d in range(0, pairs, 32):
            transpose_bf16_pairs(keys, offset + 2 * d, panel + 64 * d, due, at_ahead + 2 * d)
        for d in range(pairs, a.head_dim, 16):
            if a.kv_bf16:
                transpose_bf16(keys, offset + 2 * d, panel + 64 * d, due, at_ahead + 2 * d)
            else:
                transpose_f32(keys, offset + 4 * d, panel + 64 * d, due, at_ahead + 4 * d)


@inlined
def pack_values(a, v, next_v, memory):
    """A head's values as panels of sixteen dimensions: value j of panel c at 64 * (64 * c + j); asks for next_v."""
    (rows, offset), (ahead, at_ahead) = v, next_v
    for j in range(BLOCK):
        value, panel = peek(rows + 8 * j, int64) + offset, memory + PANELS + 64 * j
        for i in range(0, (2 if a.kv_bf16 else 4) * a.head_dim, 64):
            ask(ahead, j, at_ahead + i)
        if a.kv_bf16:
            for d in range(0, a.head_dim, 16):
                store(panel + 4 * BLOCK * d, load_bf16(value + 2 * d))
        else:
            for d in range(0, a.head_dim, 16):
                store(panel + 4 * BLOCK * d, load(value + 4 * d))


@inlined
def next_rows_count(left):
    """How many rows the next register tile takes: six, unless four (of which some may be spare) waste less."""
    return min(left, 6) if left > 8 or 4 < left < 7 else min(left, 4)


@inlined
def scores(a, tile, block, q, memory):
    """q . k of the block's rows and the slots that they see, with some more to fill the registers."""
    start, first, last = block
    panel_bytes, row = 64 * a.head_dim, first
    while row < last:
        n = next_rows_count(last - row)
        x, p = q + ROW_BYTES * row, memory + P + P_BYTES * row
        if n > 4:
            low = max(0, first_key(tile.position + row // a.unit_heads, a.window) - start) // (16 * COLS) * COLS
            high = (min(BLOCK, tile.position + (row + n - 1) // a.unit_heads + 1 - start) + 15) // 16
            for c in range(low, high, COLS):
                acc, panel = tile_zeros(6, COLS), memory + PANELS + panel_bytes * c
                for d in range(a.head_dim):
                    acc = tile_fma_f32(acc, x + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
                tile_store_rows(acc, p + 64 * c, P_BYTES, n)
        else:
            for c in range(0, BLOCK // 16, MORE_COLS):
                four, panel = tile_zeros(4, MORE_COLS), memory + PANELS + panel_bytes * c
                for d in range(a.head_dim):
                    four = tile_fma_f32(four, x + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
                tile_store_rows(four, p + 64 * c, P_BYTES, n)
        row += n


@inlined
def softmax_step(a, tile, block, base, memory):
    """Turns scores into weights, with the sums so far brought to the new maximum. base: the unit's first row."""
    start = block.start
    for row in range(block.first, block.last):
        position, p = tile.position + row // a.unit_heads, memory + P + P_BYTES * row
        lane, top = memory + LANE + LANE_BYTES * (base + row), memory + TOP + 4 * (base + row)
        o = memory + O + ROW_BYTES * (base + row)
        if a.cap > ZERO:
            for i in range(0, P_BYTES, 64):
                store(p + i, soft_capped(load(p + i), a.cap))
        seen = first_key(position, a.window) - start
        for j in range(0, seen):
            poke(p + 4 * j, MASKED)
        for j in range(position + 1 - start, BLOCK):
            poke(p + 4 * j, MASKED)
        higher = max_lanes(maximum(maximum(load(p), load(p + 64)), maximum(load(p + 128), load(p + 192)))) + ZERO
        total = lanes(ZERO)
        if start % SPAN == 0 or (seen >= 0 and a.window > 0):  # the row's first block of the span
            for i in range(0, 4 * a.head_dim, 64):
                store(o + i, total)
        else:
            before, total = peek(top, float32), load(lane)
            if higher > before:
                shrink = exp2(before - higher)
                total = cleared(total * shrink)
                for i in range(0, 4 * a.head_dim, 64):
                    store(o + i, cleared(load(o + i) * shrink))
            else:  # the factor is exactly 1
                higher = before
        for i in range(0, P_BYTES, 64):
            weight = exp2(load(p + i) - higher)
            store(p + i, weight)
            total = total + weight
        store(lane, total)
        poke(top, higher)


@inlined
def row_values(a, tile, block, v, next_v, o, memory):
    """o += p . v of at most four rows of one token, over the values where they are: only those that it sees; asks for
    next_v."""
    (start, first, last), (rows, offset), (ahead, at_ahead) = block, v, next_v
    position, n = tile.position + first // a.unit_heads, last - first
    low, high = max(0, first_key(position, a.window) - start), min(BLOCK, position + 1 - start)
    p, o, size = memory + P + P_BYTES * first, o + ROW_BYTES * first, 2 if a.kv_bf16 else 4
    columns = a.head_dim // 16 // MORE_COLS * MORE_COLS
    for c in range(0, columns, MORE_COLS):
        acc = tile_load(4, MORE_COLS, o + 64 * c, ROW_BYTES)
        column, line = offset + 16 * size * c, at_ahead + 16 * size * c
        if a.kv_bf16:
            for j in range(low, high):
                acc = tile_fma_row_bf16(acc, p + 4 * j, P_BYTES, rows, j, column)
                for i in range(0, 32 * MORE_COLS, 64):
                    ask(ahead, j, line + i)
        else:
            for j in range(low, high):
                acc = tile_fma_row_f32(acc, p + 4 * j, P_BYTES, rows, j, column)
                for i in range(0, 64 * MORE_COLS, 64):
                    ask(ahead, j, line + i)
        tile_store_rows(acc, o + 64 * c, ROW_BYTES, n)
    for c in range(columns, a.head_dim // 16):
        end, column = tile_load(4, 1, o + 64 * c, ROW_BYTES), offset + 16 * size * c
        for j in range(low, high):
            if a.kv_bf16:
                end = tile_fma_row_bf16(end, p + 4 * j, P_BYTES, rows, j, column)
            else:
                end = tile_fma_row_f32(end, p + 4 * j, P_BYTES, rows, j, column)
        tile_store_rows(end, o + 64 * c, ROW_BYTES, n)


@inlined
def add_values(a, row, low, high, o, memory):
    """o += p . v of one row and some slots."""
    if low < high:
        for c in range(0, a.head_dim // 16, 4):
            p, panel = memory + P + P_BYTES * row, memory + PANELS + 64 * BLOCK * c
            one = tile_load(1, 4, o + ROW_BYTES * row + 64 * c, 0)
            for j in range(low, high):
                one = tile_fma_f32(one, p + 4 * j, 0, panel + 64 * j, 64 * BLOCK)
            tile_store_rows(one, o + ROW_BYTES * row + 64 * c, 0, 1)


@inlined
def values(a, tile, block, o, memory):
    """o += p . v of the block's rows: register tiles over the slots that all their rows see, the others row by row.

    A slot that a row does not see must not reach it, not even as 0 * v: v may be another row's NaN. The order of the
    slots stays: what only the first rows of a tile see comes before, what only the last ones see after.
    """
    start, first, last = block
    row = first
    while row < last:
        n = next_rows_count(last - row)
        earliest, latest = tile.position + row // a.unit_heads, tile.position + (row + n - 1) // a.unit_heads
        low, high = max(0, first_key(latest, a.window) - start), min(BLOCK, earliest + 1 - start)
        if high <= low:  # nothing is seen by all
            low = high = BLOCK
        for i in range(row, row + n):
            position = tile.position + i // a.unit_heads
            add_values(a, i, max(0, first_key(position, a.window) - start), min(low, position + 1 - start), o, memory)
        p, out = memory + P + P_BYTES * row, o + ROW_BYTES * row
        if n > 4:
            for c in range(0, a.head_dim // 16, COLS):
                acc, panel = tile_load(6, COLS, out + 64 * c, ROW_BYTES), memory + PANELS + 64 * BLOCK * c
                for j in range(low, high):
                    acc = tile_fma_f32(acc, p + 4 * j, P_BYTES, panel + 64 * j, 64 * BLOCK)
                tile_store_rows(acc, out + 64 * c, ROW_BYTES, n)
        else:
            for c in range(0, a.head_dim // 16, MORE_COLS):
                four, panel = tile_load(4, MORE_COLS, out + 64 * c, ROW_BYTES), memory + PANELS + 64 * BLOCK * c
                for j in range(low, high):
                    four = tile_fma_f32(four, p + 4 * j, P_BYTES, panel + 64 * j, 64 * BLOCK)
                tile_store_rows(four, out + 64 * c, ROW_BYTES, n)
        for i in range(row, row + n):
            add_values(a, i, high, min(BLOCK, tile.position + i // a.unit_heads + 1 - start), o, memory)
        row += n
