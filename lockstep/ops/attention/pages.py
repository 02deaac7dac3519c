"""Pages of the engine's cache in float32 or bfloat16: scores and values of a block of keys for a tile of query rows.

A page is worked on where it lies (ops/attention/kv_cache.py), row by row: a row of K is a dimension of 64 keys, a row
of V all dimensions of a key; of bfloat16 two dimensions or two keys, in pairs. A step multiplies 16-lane columns of
such a row by one number, or one pair, of every query row.
"""

from collections import namedtuple

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.machine import prefetch
from lockstep.native.numbers import int32
from lockstep.native.simd import load, peek, round_bf16, store, store_bf16
from lockstep.native.targets import wide_registers
from lockstep.native.tiles import tile_fma_f32, tile_load, tile_pairs, tile_store, tile_zeros
from lockstep.ops.attention.formulas import BLOCK, exp2, first_key
from lockstep.ops.attention.softmax import P_BYTES, ROW_BYTES, Layout, O, P, Q, as_they_are, query_is_complete
from lockstep.ops.elementwise.activations import NATIVE_BF16

HEIGHT, COLS = (6, 2) if wide_registers() else (5, 1)  # HEIGHT x COLS x 16 lanes of accumulators fill the registers
FEW_COLS = 4 if wide_registers() else 2  # of two rows: lines in the order in which they lie, and registers to spare
FEW_ROWS = 8  # few rows are bound by the read of K and V
K_ROW_BYTES = 4 * BLOCK  # of a K page, in either format; of a V page they are 4 * head_dim
PAIR_BYTES = 4 if NATIVE_BF16 else 8  # of a query or weight: without an instruction for pairs they are kept as float32
ALL = -1  # mask of both halves of a pair

# one row, or two that are worked on together (next: 1, else 0), from dimension `done` on; o: its sums of values
Pair = namedtuple("Pair", "row next done o")
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


@inlined
def keep_query(how, row, d, x, memory):
    how.keep(memory + Q + ROW_BYTES * row, d, x)


@inlined
def page_of(c, tile, block, memory):
    """The page of a block."""
    return np.int64(peek(tile.table + 4 * block, int32))


@inlined
def head_bytes(c, how, head):
    """Where a head of a page begins."""
    return 4 // how.each * BLOCK * c.head_dim * (head.place * c.num_kv_heads + head.g)


@inlined
def scores(c, how, tile, block, head, next_head, memory):
    """q . k of the block's rows and the slots that any of them sees: HEIGHT rows at a time, then two by two.

    A row without a partner is its own. Of few rows the first two ask for the lines of V, in order and into the
    second-level cache: otherwise the memory gives half its speed.
    """
    start, first, last = block
    k, v = c.k + head_bytes(c, how, head), c.v + head_bytes(c, how, head)
    steps, x_bytes, step = c.head_dim // how.each, 4 if how.each == 1 else PAIR_BYTES, how.step
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    for row in range(first, high, HEIGHT):
        q = memory + Q + ROW_BYTES * (head.base + row)
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // c.unit_heads + 1 - start), 16 * COLS):
            acc = tile_zeros(HEIGHT, COLS)
            for i in range(steps):
                acc = step(acc, q + x_bytes * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, ALL)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, last, 2):
        pair, q = 1 if row + 1 < last else 0, memory + Q + ROW_BYTES * (head.base + row)
        asked = v if row == first else k
        for j in range(0, min(BLOCK, tile.position + (row + pair) // c.unit_heads + 1 - start), 16 * FEW_COLS):
            two = tile_zeros(2, FEW_COLS)
            for i in range(steps):
                two = step(two, q + x_bytes * i, ROW_BYTES * pair, k + K_ROW_BYTES * i + 4 * j, ALL)
                for line in range(FEW_COLS):
                    prefetch(asked + 4 * j * steps + 64 * (FEW_COLS * i + line))
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * pair, FEW_COLS)


@inlined
def weigh(how, p, higher, total, memory):
    """A row of scores becomes weights, in place; returns `total` with them added."""
    for j in range(0, BLOCK, 16):
        total = total + how.keep(p, j, exp2(load(p + 4 * j) - higher))
    return total


@inlined
def values(c, how, tile, block, head, next_head, memory):
    """o += w . v of the block's rows: HEIGHT rows at a time where all see the whole block, others by `ragged_values`.

    A slot that a row does not see must not reach it, not even as 0 * v: v may be anything there. Of few rows the first
    two ask for the next keys.
    """
    (start, first, last), each, step = block, how.each, how.step
    v, ahead = c.v + head_bytes(c, how, head), c.k + head_bytes(c, how, next_head)
    sums = memory + O + ROW_BYTES * head.base
    whole, end, x_bytes = first, last, 4 if each == 1 else PAIR_BYTES
    if start + BLOCK - 1 > tile.position:  # rows from `whole` to `end` see all slots
        whole = max(first, (start + BLOCK - 1 - tile.position) * c.unit_heads)
    if c.window > 0:
        end = min(last, (start + c.window - tile.position) * c.unit_heads)
    high = whole + max(0, end - whole) // HEIGHT * HEIGHT if last - first > FEW_ROWS else whole
    wide = c.head_dim // (16 * COLS) * (16 * COLS)
    for d in range(0, wide, 16 * COLS):
        for row in range(whole, high, HEIGHT):
            o = sums + ROW_BYTES * row + 4 * d
            acc = tile_load(HEIGHT, COLS, o, ROW_BYTES)
            for i in range(BLOCK // each):
                acc = step(acc, memory + P + P_BYTES * row + x_bytes * i, P_BYTES, v + 4 * (c.head_dim * i + d), ALL)
            tile_store(acc, o, ROW_BYTES, COLS)
    row = first
    while row < last:
        inside = whole <= row < high
        same_token = row + 1 < last and (row + 1) // c.unit_heads == row // c.unit_heads
        pair, done = 1 if same_token and (row + 1 < high or not inside) else 0, wide if inside else 0
        if not inside or wide < c.head_dim:
            two_rows = Pair(row, pair, done, sums + ROW_BYTES * row)
            ragged_values(c, how, tile, start, two_rows, v, ahead if row == first else v, memory)
        row += 1 + pair


@inlined
def ragged_values(c, how, tile, start, two_rows, v, ahead, memory):
    """o += w . v of a Pair of rows that see the same slots of the block at `start`; only these slots are visited.

    What lies at `ahead` is asked for meanwhile.
    """
    (row, pair, done, o), each, step = two_rows, how.each, how.step
    position, x_bytes = tile.position + row // c.unit_heads, 4 if each == 1 else PAIR_BYTES
    weights, width = memory + P + P_BYTES * row, 4 * c.head_dim
    low, high = max(0, first_key(position, c.window) - start), min(BLOCK, position + 1 - start)
    wide = done + (c.head_dim - done) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(done, wide, 16 * FEW_COLS):
        two = tile_load(2, FEW_COLS, o + 4 * d, ROW_BYTES * pair)
        for i in range(low // each, (high + each - 1) // each):
            two = step(two, weights + x_bytes * i, P_BYTES * pair, v + width * i + 4 * d, halves(each * i, low, high))
            for line in range(FEW_COLS):
                prefetch(ahead + 4 * BLOCK // each * d + 64 * (FEW_COLS * i + line))
        tile_store(two, o + 4 * d, ROW_BYTES * pair, FEW_COLS)
    for d in range(wide, c.head_dim, 16):
        one = tile_load(2, 1, o + 4 * d, ROW_BYTES * pair)
        for i in range(low // each, (high + each - 1) // each):
            one = step(one, weights + x_bytes * i, P_BYTES * pair, v + width * i + 4 * d, halves(each * i, low, high))
        tile_store(one, o + 4 * d, ROW_BYTES * pair, 1)


@inlined
def halves(slot, low, high):
    """Mask of a pair that begins at an even slot: the half of a slot outside low..high is not to be read."""
    return (0xFFFF if slot >= low else 0) | (-65536 if slot + 1 < high else 0)


SINGLE, PAIRS = (
    Layout(keep_query, query_is_complete, page_of, scores, as_they_are, weigh, values, how)
    for how in (Arithmetic(1, single_step, keep_single), Arithmetic(2, pair_step, keep_pairs))
)
