"""Pages of the engine's cache in float32 or bfloat16: scores and values of a block of keys for a tile of query rows.

A page is read where it lies (its layout is in ops/attention/kv_cache.py), row by row: a row of K is a dimension of 64
keys, a row of V all dimensions of a value; in bfloat16 a row is two dimensions or two values, in pairs. A step
multiplies 16-lane columns of such a row by one number, or one pair, of every query row.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lockstep.native.kernel import inlined
from lockstep.native.machine import prefetch
from lockstep.native.numbers import int32
from lockstep.native.simd import load, peek, round_bf16, store, store_bf16
from lockstep.native.targets import TARGET
from lockstep.native.tiles import tile_fma_f32, tile_load, tile_store, tile_zeros
from lockstep.native.tiles_pairs import (
    WATCHED,
    clear_underflow,
    exact_pairs,
    tile_pairs,
    tile_started,
    underflowed,
    watched,
)
from lockstep.ops.attention.formulas import BLOCK, exp2, first_key
from lockstep.ops.attention.softmax import P_BYTES, ROW_BYTES, Layout, O, P, Q, products_are_scores, query_is_finished
from lockstep.ops.elementwise.activations import NATIVE_BF16

HEIGHT, COLS = (8, 2) if TARGET.is_wide else (5, 1)  # HEIGHT x COLS x 16 lanes of accumulators fill the registers
FEW_COLS = 4 if TARGET.is_wide else 2  # of two rows: reads lines in the order of memory, with registers to spare
FEW_ROWS = 8  # up to this number of rows, the read of K and V is the bound
# Bytes that are prefetched ahead once more, where few rows read: processors drop prefetches while all that they can
# wait for is on its way, and those of a whole block ahead come in bursts, see studies/23-dropped-prefetches.md.
NEAR_BYTES = 3072
NEAR_STEPS = NEAR_BYTES // (64 * FEW_COLS)
K_ROW_BYTES = 4 * BLOCK  # of a row of a K page in either format; a row of a V page has 4 * head_dim
PAIR_BYTES = 4 if NATIVE_BF16 else 8  # of a query's or weight's pair: float32 where no instruction multiplies pairs
ALL = -1  # mask of both halves of a pair


class RowPair(NamedTuple):
    """A row, and if `second` is 1 (not 0) the next row, from head dimension `start_dim` on. sums: address of the
    first row's sums of values."""

    row: int
    second: int
    start_dim: int
    sums: int


class Sums(NamedTuple):
    """What the sums of a tile are made of: slots or dimensions low .. high - 1 of rows at x, x_row bytes apart, and of
    columns, `width` bytes from one step to the next. start: where the sums before them lie, start_row bytes from one
    row to the next; 0: they are zero."""

    x: int
    x_row: int
    columns: int
    width: int
    low: int
    high: int
    start: int
    start_row: int


class Arithmetic(NamedTuple):
    """How pages of a type are multiplied. per_step: how many numbers of a sum a step takes; step: as `single_step`;
    store: how sixteen numbers of a query or of weights are stored for it, as `store_singles`. begin(tile): the tile
    that the first step of a sum takes; settle(tile, Sums): the sums that the last step leads to."""

    per_step: int
    step: Callable
    store: Callable
    begin: Callable
    settle: Callable


@inlined
def as_begun(acc):
    """`Arithmetic.begin` where steps are what the definition says."""
    return acc


@inlined
def as_summed(acc, sums):
    """`Arithmetic.settle` where steps are what the definition says."""
    return acc


@inlined
def watched_begin(acc):
    """`Arithmetic.begin` where a flag says whether they may not have been."""
    return watched(acc)


@inlined
def watched_settle(acc, sums):
    """`Arithmetic.settle` where a flag says whether they may not have been: then all steps are done once more."""
    if underflowed(acc):
        acc = tile_started(acc, sums.start, sums.start_row)
        for i in range(sums.low // 2, (sums.high + 1) // 2):
            columns, mask = sums.columns + sums.width * i, halves(2 * i, sums.low, sums.high)
            acc = exact_pairs(acc, sums.x + PAIR_BYTES * i, sums.x_row, columns, 64, mask)
        clear_underflow()
    return acc


@inlined
def single_step(acc, x, x_row, columns, mask):
    """acc[r, c] = fma(x[r], columns[c], acc[r, c]) for one row of a float32 page."""
    return tile_fma_f32(acc, x, x_row, columns, 64)


@inlined
def pair_step(acc, x, x_row, columns, mask):
    """The same for one row of pairs; mask: which halves of the page's pairs count, the others are taken as zero."""
    return tile_pairs(acc, x, x_row, columns, 64, mask)


@inlined
def store_singles(place, i, x):
    """Stores elements i .. i + 15 of a row of queries or weights; returns the numbers as stored."""
    store(place + 4 * i, x)
    return x


@inlined
def store_rounded(place, i, x):
    """The same, rounded to bfloat16."""
    x = round_bf16(x)
    if NATIVE_BF16:
        store_bf16(place + 2 * i, x)
    else:
        store(place + 4 * i, x)
    return x


@inlined
def store_query(arithmetic, row, d, x, memory):
    arithmetic.store(memory + Q + ROW_BYTES * row, d, x)


@inlined
def page_of(call, tile, block, memory):
    """The page of a block, by the block's number."""
    return np.int64(peek(tile.table + 4 * block, int32))


@inlined
def head_bytes(call, arithmetic, head):
    """Where a head begins, in bytes from the first page."""
    return 4 // arithmetic.per_step * BLOCK * call.head_dim * (head.place * call.num_kv_heads + head.kv_head)


@inlined
def lines_of_each(call, arithmetic, num_tiles):
    """How many cache lines each of so many tiles prefetches, so that together they prefetch a head of a page."""
    return 4 * call.head_dim // arithmetic.per_step // num_tiles if num_tiles > 0 else 0


@inlined
def prefetch_run(place, num_lines):
    """Prefetches so many cache lines from `place` on; returns where the next ones are."""
    for line in range(num_lines):
        prefetch(place + 64 * line)
    return place + 64 * num_lines


@inlined
def prefetch_step(place):
    """Prefetches as many cache lines as a step of few rows reads."""
    for line in range(FEW_COLS):
        prefetch(place + 64 * line)


@inlined
def prefetch_near_keys(k, v, step, num_steps, width):
    """Prefetches what few rows read at a step: of columns k of the keys, then of the values. width: of a row of V."""
    prefetch_step(k + K_ROW_BYTES * step if step < num_steps else v + width * (step - num_steps))


@inlined
def prefetch_near_values(v, k, step, num_steps, width, is_last):
    """The same of columns v of the values, then of the columns after them; after the last ones, of the keys at k."""
    after = step - num_steps
    columns_after = k + 64 * FEW_COLS * after if is_last else v + 64 * FEW_COLS + width * after
    prefetch_step(v + width * step if step < num_steps else columns_after)


@inlined
def scores(call, arithmetic, tile, block, head, next_head, memory):
    """q . k of the block's rows and the slots that any of them sees: HEIGHT rows at a time, then two at a time, or one
    where a row is left.

    Meanwhile V is prefetched: bit by bit or, where there are few rows, all of it by each two, in the order of memory.
    They also prefetch what they read NEAR_STEPS later.
    """
    start, first, end = block
    k, v = call.k + head_bytes(call, arithmetic, head), call.v + head_bytes(call, arithmetic, head)
    per_step, step = arithmetic.per_step, arithmetic.step
    num_steps, x_bytes, width = call.head_dim // per_step, 4 if per_step == 1 else PAIR_BYTES, 4 * call.head_dim
    high = first + (end - first) // HEIGHT * HEIGHT if end - first > FEW_ROWS else first
    ahead, num_lines = v, lines_of_each(call, arithmetic, (high - first) // HEIGHT * (BLOCK // 16 // COLS))
    for row in range(first, high, HEIGHT):
        q = memory + Q + ROW_BYTES * (head.first_row + row)
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // call.unit_heads + 1 - start), 16 * COLS):
            ahead = prefetch_run(ahead, num_lines)
            acc = arithmetic.begin(tile_zeros(HEIGHT, COLS))
            for i in range(num_steps):
                acc = step(acc, q + x_bytes * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, ALL)
            acc = arithmetic.settle(acc, Sums(q, ROW_BYTES, k + 4 * j, K_ROW_BYTES, 0, call.head_dim, 0, 0))
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, end, 2):
        second, q = 1 if row + 1 < end else 0, memory + Q + ROW_BYTES * (head.first_row + row)
        for j in range(0, min(BLOCK, tile.position + (row + second) // call.unit_heads + 1 - start), 16 * FEW_COLS):
            two = arithmetic.begin(tile_zeros(2, FEW_COLS))
            for i in range(num_steps):
                two = step(two, q + x_bytes * i, ROW_BYTES * second, k + K_ROW_BYTES * i + 4 * j, ALL)
                prefetch_step(v + 4 * j * num_steps + 64 * FEW_COLS * i)
                prefetch_near_keys(k + 4 * j, v, i + NEAR_STEPS, num_steps, width)
            two = arithmetic.settle(two, Sums(q, ROW_BYTES * second, k + 4 * j, K_ROW_BYTES, 0, call.head_dim, 0, 0))
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * second, FEW_COLS)


@inlined
def weigh(arithmetic, p, higher, sums, memory):
    """Turns a row of scores into weights, in place; returns `sums` with the weights added."""
    for j in range(0, BLOCK, 16):
        sums = sums + arithmetic.store(p, j, exp2(load(p + 4 * j) - higher))
    return sums


@inlined
def add_values(call, arithmetic, tile, block, head, next_head, memory):
    """o += w . v of the block's rows: HEIGHT rows at a time where all of them see the whole block, the other rows by
    `add_seen_values`.

    A slot that a row does not see must not reach the row's sums, not even as 0 * v: v may be anything there. Where
    there are few rows, each two prefetch the next keys.
    """
    (start, first, end), per_step, step = block, arithmetic.per_step, arithmetic.step
    v, k_ahead = call.v + head_bytes(call, arithmetic, head), call.k + head_bytes(call, arithmetic, next_head)
    unit_sums = memory + O + ROW_BYTES * head.first_row
    whole, whole_end, x_bytes = first, end, 4 if per_step == 1 else PAIR_BYTES
    if start + BLOCK - 1 > tile.position:  # rows from `whole` to `whole_end` see all slots
        whole = max(first, (start + BLOCK - 1 - tile.position) * call.unit_heads)
    if call.window > 0:
        whole_end = min(end, (start + call.window - tile.position) * call.unit_heads)
    high = whole + max(0, whole_end - whole) // HEIGHT * HEIGHT if end - first > FEW_ROWS else whole
    wide = call.head_dim // (16 * COLS) * (16 * COLS)
    ahead, num_lines = k_ahead, lines_of_each(call, arithmetic, (high - whole) // HEIGHT * (wide // (16 * COLS)))
    for d in range(0, wide, 16 * COLS):
        for row in range(whole, high, HEIGHT):
            ahead, o = prefetch_run(ahead, num_lines), unit_sums + ROW_BYTES * row + 4 * d
            acc = arithmetic.begin(tile_load(HEIGHT, COLS, o, ROW_BYTES))
            for i in range(BLOCK // per_step):
                acc = step(acc, memory + P + P_BYTES * row + x_bytes * i, P_BYTES, v + 4 * (call.head_dim * i + d), ALL)
            w = memory + P + P_BYTES * row
            acc = arithmetic.settle(acc, Sums(w, P_BYTES, v + 4 * d, 4 * call.head_dim, 0, BLOCK, o, ROW_BYTES))
            tile_store(acc, o, ROW_BYTES, COLS)
    row = first
    while row < end:
        inside = whole <= row < high
        same_token = row + 1 < end and (row + 1) // call.unit_heads == row // call.unit_heads
        second, start_dim = 1 if same_token and (row + 1 < high or not inside) else 0, wide if inside else 0
        if not inside or wide < call.head_dim:
            pair = RowPair(row, second, start_dim, unit_sums + ROW_BYTES * row)
            ahead = k_ahead if row == first or end - first <= FEW_ROWS else v
            add_seen_values(call, arithmetic, tile, start, pair, v, ahead, memory)
        row += 1 + second


@inlined
def add_seen_values(call, arithmetic, tile, start, pair, v, ahead, memory):
    """o += w . v of a RowPair whose rows see the same slots of the block at `start`; only these slots are read.

    What lies at `ahead` is prefetched meanwhile, and what is read NEAR_STEPS later.
    """
    (row, second, start_dim, o), per_step, step = pair, arithmetic.per_step, arithmetic.step
    position, x_bytes = tile.position + row // call.unit_heads, 4 if per_step == 1 else PAIR_BYTES
    w, width, num_steps = memory + P + P_BYTES * row, 4 * call.head_dim, BLOCK // per_step
    low, high = max(0, first_key(position, call.window) - start), min(BLOCK, position + 1 - start)
    wide = start_dim + (call.head_dim - start_dim) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(start_dim, wide, 16 * FEW_COLS):
        two = arithmetic.begin(tile_load(2, FEW_COLS, o + 4 * d, ROW_BYTES * second))
        for i in range(low // per_step, (high + per_step - 1) // per_step):
            two = step(two, w + x_bytes * i, P_BYTES * second, v + width * i + 4 * d, halves(per_step * i, low, high))
            prefetch_step(ahead + 4 * num_steps * d + 64 * FEW_COLS * i)
            is_last = d + 16 * FEW_COLS >= wide
            prefetch_near_values(v + 4 * d, ahead, i + NEAR_STEPS, num_steps, width, is_last)
        sums = Sums(w, P_BYTES * second, v + 4 * d, width, low, high, o + 4 * d, ROW_BYTES * second)
        two = arithmetic.settle(two, sums)
        tile_store(two, o + 4 * d, ROW_BYTES * second, FEW_COLS)
    for d in range(wide, call.head_dim, 16):
        one = arithmetic.begin(tile_load(2, 1, o + 4 * d, ROW_BYTES * second))
        for i in range(low // per_step, (high + per_step - 1) // per_step):
            one = step(one, w + x_bytes * i, P_BYTES * second, v + width * i + 4 * d, halves(per_step * i, low, high))
        sums = Sums(w, P_BYTES * second, v + 4 * d, width, low, high, o + 4 * d, ROW_BYTES * second)
        one = arithmetic.settle(one, sums)
        tile_store(one, o + 4 * d, ROW_BYTES * second, 1)


@inlined
def halves(slot, low, high):
    """The mask of a pair that begins at an even slot: it hides the half of a slot outside low .. high - 1."""
    return (0xFFFF if slot >= low else 0) | (-65536 if slot + 1 < high else 0)


BEGIN, SETTLE = (watched_begin, watched_settle) if WATCHED else (as_begun, as_summed)
SINGLE, PAIRS = (
    Layout(store_query, query_is_finished, page_of, scores, products_are_scores, weigh, add_values, arithmetic)
    for arithmetic in (
        Arithmetic(1, single_step, store_singles, as_begun, as_summed),
        Arithmetic(2, pair_step, store_rounded, BEGIN, SETTLE),
    )
)
