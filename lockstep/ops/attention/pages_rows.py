"""Pages of any size and layout in which the numbers of a head lie together: scores and values of a block of keys.

K and V are read in place, through tables of addresses with one entry for each position of the block, each line once for
all rows of a unit. Slots that no row of the tile sees are not read. Whatever type the pages have, their numbers are
widened to float32 as they are packed, so that the arithmetic is that of float32 pages. Scratch memory of its own:

    panels [columns / 16, rows, 16] of K or V    tables 2 x 2 x [64] addresses: K and V of a block and of the next
"""

from collections import namedtuple

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.numbers import int32, int64
from lockstep.native.simd import load, peek, poke, store
from lockstep.native.targets import wide_registers
from lockstep.native.tiles import tile_fma_f32, tile_load, tile_zeros
from lockstep.native.tiles_rows import ROW_NUMBERS, RowNumbers, ask, tile_store_rows
from lockstep.ops.attention.formulas import BLOCK, MAX_HEAD_DIM, exp2, first_key
from lockstep.ops.attention.softmax import OWN, P_BYTES, ROW_BYTES, Layout, O, P, Q, as_they_are, query_is_complete

COLS, MORE_COLS = (2, 4) if wide_registers() else (1, 1)  # 6 x COLS or 4 x MORE_COLS accumulators fill the registers
FEW_ROWS = 4  # rows of one token that work on V where it is: packing it would take longer
TABLE_BYTES = 8 * BLOCK
PANELS = OWN
TABLES = PANELS + 4 * BLOCK * (MAX_HEAD_DIM + 64)
SCRATCH_BYTES = TABLES + 4 * TABLE_BYTES

# bytes from one page, slot of a page or head of a slot to the next, of K and of V; page_size: slots of a page
Places = namedtuple("Places", "page_size k_page k_slot k_head v_page v_slot v_head")
# a head's keys or values: the table of its rows' addresses, and where in each they begin, in bytes
Rows = namedtuple("Rows", "table offset")


@inlined
def keep_query(how, row, d, x, memory):
    store(memory + Q + ROW_BYTES * row + 4 * d, x)


@inlined
def name_rows(c, tile, block, memory):
    """Fills two tables with the addresses of a block's rows (of kv head 0) of K and of V; returns where they are.

    Slots that no row of the tile sees must not be read: the first one that is seen stands for them.
    """
    start, rows, places = block * BLOCK, memory + TABLES + 2 * TABLE_BYTES * (block & 1), c.pages
    low, high = max(start, first_key(tile.position, c.window)), min(start + BLOCK, tile.position + tile.tokens)
    at, slot = tile.table + 4 * (low // places.page_size), low % places.page_size
    if high < low + BLOCK:
        page = np.int64(peek(at, int32))
        for j in range(BLOCK):
            poke(rows + 8 * j, c.k + places.k_page * page + places.k_slot * slot)
            poke(rows + TABLE_BYTES + 8 * j, c.v + places.v_page * page + places.v_slot * slot)
    while low < high:
        page, size, here = np.int64(peek(at, int32)), min(high - low, places.page_size - slot), rows + 8 * (low - start)
        for i in range(size):
            poke(here + 8 * i, c.k + places.k_page * page + places.k_slot * (slot + i))
            poke(here + TABLE_BYTES + 8 * i, c.v + places.v_page * page + places.v_slot * (slot + i))
        at, slot, low = at + 4, int64(0), low + size
    return rows


@inlined
def keys(c, head):
    return Rows(head.place, c.pages.k_head * head.g)


@inlined
def values_of(c, head):
    return Rows(head.place + TABLE_BYTES, c.pages.v_head * head.g)


@inlined
def pack_keys(c, how, k, next_k, memory):
    """A head's keys as panels of sixteen keys: dimension d of panel c at 64 * (c * head_dim + d); asks for next_k."""
    (rows, offset), (ahead, at_ahead), size = k, next_k, how.size
    wide = c.head_dim // how.wide * how.wide
    for column in range(BLOCK // 16):
        panel, row, due = memory + PANELS + 64 * c.head_dim * column, rows + 128 * column, ahead + 128 * column
        for d in range(0, wide, how.wide):
            how.transpose_wide(row, offset + size * d, panel + 64 * d, due, at_ahead + size * d)
        for d in range(wide, c.head_dim, 16):
            how.transpose(row, offset + size * d, panel + 64 * d, due, at_ahead + size * d)


@inlined
def pack_values(c, how, v, next_v, memory):
    """A head's values as panels of sixteen dimensions: value j of panel c at 64 * (64 * c + j); asks for next_v."""
    (rows, offset), (ahead, at_ahead) = v, next_v
    for j in range(BLOCK):
        value, panel = peek(rows + 8 * j, int64) + offset, memory + PANELS + 64 * j
        for i in range(0, how.size * c.head_dim, 64):
            ask(ahead, j, at_ahead + i)
        for d in range(0, c.head_dim, 16):
            store(panel + 4 * BLOCK * d, how.load(value + how.size * d))


@inlined
def next_rows_count(left):
    """How many rows the next register tile takes: six, unless four (of which some may be spare) waste less."""
    return min(left, 6) if left > 8 or 4 < left < 7 else min(left, 4)


@inlined
def scores(c, how, tile, block, head, next_head, memory):
    """q . k of the block's rows and the slots that they see, with some more to fill the registers."""
    pack_keys(c, how, keys(c, head), keys(c, next_head), memory)
    start, first, last = block
    panel_bytes, q, row = 64 * c.head_dim, memory + Q + ROW_BYTES * head.base, first
    while row < last:
        n = next_rows_count(last - row)
        x, p = q + ROW_BYTES * row, memory + P + P_BYTES * row
        if n > 4:
            low = max(0, first_key(tile.position + row // c.unit_heads, c.window) - start) // (16 * COLS) * COLS
            high = (min(BLOCK, tile.position + (row + n - 1) // c.unit_heads + 1 - start) + 15) // 16
            for column in range(low, high, COLS):
                acc, panel = tile_zeros(6, COLS), memory + PANELS + panel_bytes * column
                for d in range(c.head_dim):
                    acc = tile_fma_f32(acc, x + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
                tile_store_rows(acc, p + 64 * column, P_BYTES, n)
        else:
            for column in range(0, BLOCK // 16, MORE_COLS):
                four, panel = tile_zeros(4, MORE_COLS), memory + PANELS + panel_bytes * column
                for d in range(c.head_dim):
                    four = tile_fma_f32(four, x + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
                tile_store_rows(four, p + 64 * column, P_BYTES, n)
        row += n


@inlined
def weigh(how, p, higher, total, memory):
    """A row of scores becomes weights, in place; returns `total` with them added."""
    for i in range(0, P_BYTES, 64):
        weight = exp2(load(p + i) - higher)
        store(p + i, weight)
        total = total + weight
    return total


@inlined
def values(c, how, tile, block, head, next_head, memory):
    """o += p . v of the block's rows: few rows of one token where V is, others after it has been packed."""
    v, next_v, o = values_of(c, head), values_of(c, next_head), memory + O + ROW_BYTES * head.base
    count = block.last - block.first
    if count <= FEW_ROWS and count <= c.unit_heads:
        row_values(c, how, tile, block, v, next_v, o, memory)
    else:
        pack_values(c, how, v, next_v, memory)
        packed_values(c, tile, block, o, memory)


@inlined
def row_values(c, how, tile, block, v, next_v, o, memory):
    """o += p . v of at most four rows of one token, over the values where they are: only those that it sees; asks for
    next_v."""
    (start, first, last), (rows, offset), (ahead, at_ahead) = block, v, next_v
    position, n = tile.position + first // c.unit_heads, last - first
    low, high = max(0, first_key(position, c.window) - start), min(BLOCK, position + 1 - start)
    p, o, size = memory + P + P_BYTES * first, o + ROW_BYTES * first, how.size
    columns = c.head_dim // 16 // MORE_COLS * MORE_COLS
    for column in range(0, columns, MORE_COLS):
        acc = tile_load(4, MORE_COLS, o + 64 * column, ROW_BYTES)
        here, line = offset + 16 * size * column, at_ahead + 16 * size * column
        for j in range(low, high):
            acc = how.fma_row(acc, p + 4 * j, P_BYTES, rows, j, here)
            for i in range(0, 16 * size * MORE_COLS, 64):
                ask(ahead, j, line + i)
        tile_store_rows(acc, o + 64 * column, ROW_BYTES, n)
    for column in range(columns, c.head_dim // 16):
        end, here = tile_load(4, 1, o + 64 * column, ROW_BYTES), offset + 16 * size * column
        for j in range(low, high):
            end = how.fma_row(end, p + 4 * j, P_BYTES, rows, j, here)
        tile_store_rows(end, o + 64 * column, ROW_BYTES, n)


@inlined
def add_values(c, row, low, high, o, memory):
    """o += p . v of one row and some slots."""
    if low < high:
        for column in range(0, c.head_dim // 16, 4):
            p, panel = memory + P + P_BYTES * row, memory + PANELS + 64 * BLOCK * column
            one = tile_load(1, 4, o + ROW_BYTES * row + 64 * column, 0)
            for j in range(low, high):
                one = tile_fma_f32(one, p + 4 * j, 0, panel + 64 * j, 64 * BLOCK)
            tile_store_rows(one, o + ROW_BYTES * row + 64 * column, 0, 1)


@inlined
def packed_values(c, tile, block, o, memory):
    """o += p . v of the block's rows: register tiles over the slots that all their rows see, the others row by row.

    A slot that a row does not see must not reach it, not even as 0 * v: v may be another row's NaN. The order of the
    slots stays: what only the first rows of a tile see comes before, what only the last ones see after.
    """
    start, first, last = block
    row = first
    while row < last:
        n = next_rows_count(last - row)
        earliest, latest = tile.position + row // c.unit_heads, tile.position + (row + n - 1) // c.unit_heads
        low, high = max(0, first_key(latest, c.window) - start), min(BLOCK, earliest + 1 - start)
        if high <= low:  # nothing is seen by all
            low = high = BLOCK
        for i in range(row, row + n):
            position = tile.position + i // c.unit_heads
            add_values(c, i, max(0, first_key(position, c.window) - start), min(low, position + 1 - start), o, memory)
        p, out = memory + P + P_BYTES * row, o + ROW_BYTES * row
        if n > 4:
            for column in range(0, c.head_dim // 16, COLS):
                acc, panel = tile_load(6, COLS, out + 64 * column, ROW_BYTES), memory + PANELS + 64 * BLOCK * column
                for j in range(low, high):
                    acc = tile_fma_f32(acc, p + 4 * j, P_BYTES, panel + 64 * j, 64 * BLOCK)
                tile_store_rows(acc, out + 64 * column, ROW_BYTES, n)
        else:
            for column in range(0, c.head_dim // 16, MORE_COLS):
                four = tile_load(4, MORE_COLS, out + 64 * column, ROW_BYTES)
                panel = memory + PANELS + 64 * BLOCK * column
                for j in range(low, high):
                    four = tile_fma_f32(four, p + 4 * j, P_BYTES, panel + 64 * j, 64 * BLOCK)
                tile_store_rows(four, out + 64 * column, ROW_BYTES, n)
        for i in range(row, row + n):
            add_values(c, i, high, min(BLOCK, tile.position + i // c.unit_heads + 1 - start), o, memory)
        row += n


def as_function(primitive):
    """A primitive as a function, which may be part of a tuple."""

    @inlined
    def call(*operands):
        return primitive(*operands)

    return call


def rows_of(numbers):
    """The Layout of rows of a type of numbers, a RowNumbers."""
    how = RowNumbers(*(part if isinstance(part, int) else as_function(part) for part in numbers))
    return Layout(keep_query, query_is_complete, name_rows, scores, as_they_are, weigh, values, how)


LAYOUTS = {name: rows_of(numbers) for name, numbers in ROW_NUMBERS.items()}
