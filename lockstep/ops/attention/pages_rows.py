"""Pages of any size and layout in which the numbers of a head lie together: scores and values of a block of keys.

K and V are read in place, through tables of addresses with one entry for each position of the block, each cache line
once for all rows of a unit. Slots that no row of the tile sees are not read. Numbers of every type are widened to
float32 when they are packed into panels, so that the arithmetic is that of float32 pages. The layout's own scratch
memory holds

    panels [columns / 16, rows, 16] of K or V    tables 2 x 2 x [64] addresses: K and V of a block and of the next
"""

from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.numbers import int32, int64
from lockstep.native.simd import load, peek, poke, store
from lockstep.native.targets import TARGET
from lockstep.native.tiles import tile_fma_f32, tile_load, tile_zeros
from lockstep.native.tiles_rows import ROW_NUMBERS, RowNumbers, prefetch_row, tile_store_rows
from lockstep.ops.attention.formulas import BLOCK, MAX_HEAD_DIM, exp2, first_key
from lockstep.ops.attention.softmax import (
    OWN,
    P_BYTES,
    ROW_BYTES,
    Layout,
    O,
    P,
    Q,
    products_are_scores,
    query_is_finished,
)

COLS, MORE_COLS = (2, 4) if TARGET.is_wide else (1, 1)  # 6 x COLS or 4 x MORE_COLS accumulators fill the registers
FEW_ROWS = 4  # up to this number of rows of one token read V in place: packing V would take longer
TABLE_BYTES = 8 * BLOCK
PANELS = OWN
TABLES = PANELS + 4 * BLOCK * (MAX_HEAD_DIM + 64)
SCRATCH_BYTES = TABLES + 4 * TABLE_BYTES


class Strides(NamedTuple):
    """How pages lie in memory: bytes from one page, slot of a page or head of a slot to the next, of K and of V.
    page_size: slots of a page."""

    page_size: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int


class Rows(NamedTuple):
    """One head's keys or values of a block: the address of the table of rows, and where the head begins in each row, in
    bytes."""

    table: int
    offset: int


@inlined
def store_query(numbers, row, d, x, memory):
    store(memory + Q + ROW_BYTES * row + 4 * d, x)


@inlined
def fill_tables(call, tile, block, memory):
    """Fills two tables with the addresses of a block's rows (of kv head 0) of K and of V; returns where the tables lie.

    Slots that no row of the tile sees must not be read: they get the address of the first slot that is seen.
    """
    start, rows, strides = block * BLOCK, memory + TABLES + 2 * TABLE_BYTES * (block & 1), call.strides
    low, high = max(start, first_key(tile.position, call.window)), min(start + BLOCK, tile.position + tile.num_tokens)
    at, slot = tile.table + 4 * (low // strides.page_size), low % strides.page_size
    if high < low + BLOCK:
        page = np.int64(peek(at, int32))
        for j in range(BLOCK):
            poke(rows + 8 * j, call.k + strides.k_page * page + strides.k_slot * slot)
            poke(rows + TABLE_BYTES + 8 * j, call.v + strides.v_page * page + strides.v_slot * slot)
    while low < high:
        page, here = np.int64(peek(at, int32)), rows + 8 * (low - start)
        num_slots = min(high - low, strides.page_size - slot)
        for i in range(num_slots):
            poke(here + 8 * i, call.k + strides.k_page * page + strides.k_slot * (slot + i))
            poke(here + TABLE_BYTES + 8 * i, call.v + strides.v_page * page + strides.v_slot * (slot + i))
        at, slot, low = at + 4, int64(0), low + num_slots
    return rows


@inlined
def keys_of(call, head):
    return Rows(head.place, call.strides.k_head * head.kv_head)


@inlined
def values_of(call, head):
    return Rows(head.place + TABLE_BYTES, call.strides.v_head * head.kv_head)


@inlined
def pack_keys(call, numbers, k, next_k, memory):
    """Packs a head's keys into panels of sixteen keys, dimension d of panel c at 64 * (c * head_dim + d); prefetches
    next_k."""
    (rows, offset), (rows_ahead, offset_ahead), size = k, next_k, numbers.size
    wide = call.head_dim // numbers.wide * numbers.wide
    for column in range(BLOCK // 16):
        panel = memory + PANELS + 64 * call.head_dim * column
        row, row_ahead = rows + 128 * column, rows_ahead + 128 * column
        for d in range(0, wide, numbers.wide):
            numbers.transpose_wide(row, offset + size * d, panel + 64 * d, row_ahead, offset_ahead + size * d)
        for d in range(wide, call.head_dim, 16):
            numbers.transpose(row, offset + size * d, panel + 64 * d, row_ahead, offset_ahead + size * d)


@inlined
def pack_values(call, numbers, v, next_v, memory):
    """Packs a head's values into panels of sixteen dimensions, value j of panel c at 64 * (64 * c + j); prefetches
    next_v."""
    (rows, offset), (rows_ahead, offset_ahead) = v, next_v
    for j in range(BLOCK):
        value, panel = peek(rows + 8 * j, int64) + offset, memory + PANELS + 64 * j
        for i in range(0, numbers.size * call.head_dim, 64):
            prefetch_row(rows_ahead, j, offset_ahead + i)
        for d in range(0, call.head_dim, 16):
            store(panel + 4 * BLOCK * d, numbers.load(value + numbers.size * d))


@inlined
def next_height(num_rows):
    """How many of the rows that are left the next register tile takes: six, unless a tile of four, some of whose rows
    may be unused, wastes less."""
    return min(num_rows, 6) if num_rows > 8 or 4 < num_rows < 7 else min(num_rows, 4)


@inlined
def scores(call, numbers, tile, block, head, next_head, memory):
    """q . k of the block's rows and the slots that they see, and of some more slots to fill the registers."""
    pack_keys(call, numbers, keys_of(call, head), keys_of(call, next_head), memory)
    start, first, end = block
    panel_bytes, q, row = 64 * call.head_dim, memory + Q + ROW_BYTES * head.first_row, first
    while row < end:
        height = next_height(end - row)
        x, p = q + ROW_BYTES * row, memory + P + P_BYTES * row
        if height > 4:
            low = max(0, first_key(tile.position + row // call.unit_heads, call.window) - start) // (16 * COLS) * COLS
            high = (min(BLOCK, tile.position + (row + height - 1) // call.unit_heads + 1 - start) + 15) // 16
            for column in range(low, high, COLS):
                acc, panel = tile_zeros(6, COLS), memory + PANELS + panel_bytes * column
                for d in range(call.head_dim):
                    acc = tile_fma_f32(acc, x + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
                tile_store_rows(acc, p + 64 * column, P_BYTES, height)
        else:
            for column in range(0, BLOCK // 16, MORE_COLS):
                four, panel = tile_zeros(4, MORE_COLS), memory + PANELS + panel_bytes * column
                for d in range(call.head_dim):
                    four = tile_fma_f32(four, x + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
                tile_store_rows(four, p + 64 * column, P_BYTES, height)
        row += height


@inlined
def weigh(numbers, p, higher, sums, memory):
    """Turns a row of scores into weights, in place; returns `sums` with the weights added."""
    for i in range(0, P_BYTES, 64):
        weight = exp2(load(p + i) - higher)
        store(p + i, weight)
        sums = sums + weight
    return sums


@inlined
def add_values(call, numbers, tile, block, head, next_head, memory):
    """o += p . v of the block's rows: in place for few rows of one token, else over packed values."""
    v, next_v, o = values_of(call, head), values_of(call, next_head), memory + O + ROW_BYTES * head.first_row
    num_rows = block.end_row - block.first_row
    if num_rows <= FEW_ROWS and num_rows <= call.unit_heads:
        add_values_in_place(call, numbers, tile, block, v, next_v, o, memory)
    else:
        pack_values(call, numbers, v, next_v, memory)
        add_packed_values(call, tile, block, o, memory)


@inlined
def add_values_in_place(call, numbers, tile, block, v, next_v, o, memory):
    """o += p . v of at most four rows of one token, over the values that the token sees, read in place; prefetches
    next_v."""
    (start, first, end), (rows, offset), (rows_ahead, offset_ahead) = block, v, next_v
    position, height = tile.position + first // call.unit_heads, end - first
    low, high = max(0, first_key(position, call.window) - start), min(BLOCK, position + 1 - start)
    p, o, size = memory + P + P_BYTES * first, o + ROW_BYTES * first, numbers.size
    num_columns = call.head_dim // 16 // MORE_COLS * MORE_COLS
    for column in range(0, num_columns, MORE_COLS):
        acc = tile_load(4, MORE_COLS, o + 64 * column, ROW_BYTES)
        here, line = offset + 16 * size * column, offset_ahead + 16 * size * column
        for j in range(low, high):
            acc = numbers.fma_row(acc, p + 4 * j, P_BYTES, rows, j, here)
            for i in range(0, 16 * size * MORE_COLS, 64):
                prefetch_row(rows_ahead, j, line + i)
        tile_store_rows(acc, o + 64 * column, ROW_BYTES, height)
    for column in range(num_columns, call.head_dim // 16):
        four, here = tile_load(4, 1, o + 64 * column, ROW_BYTES), offset + 16 * size * column
        for j in range(low, high):
            four = numbers.fma_row(four, p + 4 * j, P_BYTES, rows, j, here)
        tile_store_rows(four, o + 64 * column, ROW_BYTES, height)


@inlined
def add_row_values(call, row, low, high, o, memory):
    """o += p . v of one row and slots low .. high - 1, over packed values."""
    if low < high:
        for column in range(0, call.head_dim // 16, 4):
            p, panel = memory + P + P_BYTES * row, memory + PANELS + 64 * BLOCK * column
            one = tile_load(1, 4, o + ROW_BYTES * row + 64 * column, 0)
            for j in range(low, high):
                one = tile_fma_f32(one, p + 4 * j, 0, panel + 64 * j, 64 * BLOCK)
            tile_store_rows(one, o + ROW_BYTES * row + 64 * column, 0, 1)


@inlined
def add_packed_values(call, tile, block, o, memory):
    """o += p . v of the block's rows: register tiles over the slots that all rows of a tile see, the other slots row by
    row.

    A slot that a row does not see must not reach the row's sums, not even as 0 * v: v may be another row's NaN. Slots
    stay in order: those that only the first rows of a tile see come before, those that only the last rows see after.
    """
    start, first, end = block
    row = first
    while row < end:
        height = next_height(end - row)
        earliest, latest = tile.position + row // call.unit_heads, tile.position + (row + height - 1) // call.unit_heads
        low, high = max(0, first_key(latest, call.window) - start), min(BLOCK, earliest + 1 - start)
        if high <= low:  # nothing is seen by all
            low = high = BLOCK
        for i in range(row, row + height):
            position = tile.position + i // call.unit_heads
            first_slot = max(0, first_key(position, call.window) - start)
            add_row_values(call, i, first_slot, min(low, position + 1 - start), o, memory)
        p, out = memory + P + P_BYTES * row, o + ROW_BYTES * row
        if height > 4:
            for column in range(0, call.head_dim // 16, COLS):
                acc, panel = tile_load(6, COLS, out + 64 * column, ROW_BYTES), memory + PANELS + 64 * BLOCK * column
                for j in range(low, high):
                    acc = tile_fma_f32(acc, p + 4 * j, P_BYTES, panel + 64 * j, 64 * BLOCK)
                tile_store_rows(acc, out + 64 * column, ROW_BYTES, height)
        else:
            for column in range(0, call.head_dim // 16, MORE_COLS):
                four = tile_load(4, MORE_COLS, out + 64 * column, ROW_BYTES)
                panel = memory + PANELS + 64 * BLOCK * column
                for j in range(low, high):
                    four = tile_fma_f32(four, p + 4 * j, P_BYTES, panel + 64 * j, 64 * BLOCK)
                tile_store_rows(four, out + 64 * column, ROW_BYTES, height)
        for i in range(row, row + height):
            add_row_values(call, i, high, min(BLOCK, tile.position + i // call.unit_heads + 1 - start), o, memory)
        row += height


def as_function(primitive):
    """A primitive as a function, which may be part of a tuple."""

    @inlined
    def function(*operands):
        return primitive(*operands)

    return function


def layout_of(numbers):
    """The Layout of pages with rows of a type of numbers, a RowNumbers."""
    numbers = RowNumbers(*(part if isinstance(part, int) else as_function(part) for part in numbers))
    return Layout(store_query, query_is_finished, fill_tables, scores, products_are_scores, weigh, add_values, numbers)


LAYOUTS = {name: layout_of(numbers) for name, numbers in ROW_NUMBERS.items()}
