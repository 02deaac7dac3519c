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
from lockstep.ops.attention_math import BLOCK, SPAN, ZERO, cleared, exp2, soft_capped
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

# gate: address of the first gate, 0 for none; gate_bytes, gate_stride: to the next token's and to the next head's
# group: query heads of a tile
Call = namedtuple(
    "Call", "out stats q k_pages v_pages gate gate_bytes gate_stride heads kv_heads head_dim group window scale cap"
)
# table: address of the request's page ids
Tile = namedtuple("Tile", "token tokens position head kv_head table")


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
def first_key(call, position):
    """The first key that a query sees."""
    return max(0, position + 1 - call.window) if call.window > 0 else 0


@inlined
def load_queries(call, tile, how, memory):
    """The tile's queries, scaled, one row after the other. how: see `attend_span`."""
    _, _, keep = how
    for row in range(tile.tokens * call.group):
        token, head = tile.token + row // call.group, tile.head + row % call.group
        source = call.q + 4 * call.head_dim * (call.heads * token + head)
        for d in range(0, call.head_dim, 16):
            keep(memory + Q + ROW_BYTES * row, d, cleared(load(source + 4 * d) * call.scale))


@inlined
def attend_span(call, tile, span, how, memory):
    """Adds the blocks of one span to the rows that see any of their keys.

    how: how many numbers of a reduction a step takes, one or two; the step; how queries and weights are stored for it.
    While few rows work on a block's keys, its values come from memory, and then the next block's keys.
    """
    each, step, keep = how
    first_block = max(first_key(call, tile.position), span * SPAN) // BLOCK
    last_block = min(tile.position + tile.tokens - 1, (span + 1) * SPAN - 1) // BLOCK
    size = 4 // each * BLOCK * call.head_dim
    ahead = size * (np.int64(peek(tile.table + 4 * first_block, int32)) * call.kv_heads + tile.kv_head)
    for block in range(first_block, last_block + 1):
        start, last, page = block * BLOCK, tile.tokens, ahead
        if call.window > 0:
            last = min(last, start + BLOCK - 1 + call.window - tile.position)
        first, last = max(0, start - tile.position) * call.group, last * call.group
        next_page = np.int64(peek(tile.table + 4 * min(block + 1, last_block), int32))
        ahead = size * (next_page * call.kv_heads + tile.kv_head)
        scores(call, tile, call.k_pages + page, call.v_pages + page, start, first, last, each, step, memory)
        softmax_step(call, tile, start, first, last, keep, memory)
        values(call, tile, call.v_pages + page, call.k_pages + ahead, start, first, last, each, step, memory)


@inlined
def scores(call, tile, k, ahead, start, first, last, each, step, memory):
    """q . k of rows first..last and the slots that any of them sees: HEIGHT rows at a time, then two by two.

    A row without a partner is its own. Of few rows the first two ask for the lines of V at `ahead`, in order and into
    the second-level cache: otherwise the memory gives half its speed.
    """
    steps, x_bytes = call.head_dim // each, 4 if each == 1 else PAIR_BYTES
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    for row in range(first, high, HEIGHT):
        q = memory + Q + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // call.group + 1 - start), 16 * COLS):
            acc = tile_zeros(HEIGHT, COLS)
            for i in range(steps):
                acc = step(acc, q + x_bytes * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, ALL)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, last, 2):
        pair, q, asked = 1 if row + 1 < last else 0, memory + Q + ROW_BYTES * row, ahead if row == first else k
        for j in range(0, min(BLOCK, tile.position + (row + pair) // call.group + 1 - start), 16 * FEW_COLS):
            two = tile_zeros(2, FEW_COLS)
            for i in range(steps):
                two = step(two, q + x_bytes * i, ROW_BYTES * pair, k + K_ROW_BYTES * i + 4 * j, ALL)
                for line in range(FEW_COLS):
                    prefetch(asked + 4 * j * steps + 64 * (FEW_COLS * i + line))
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * pair, FEW_COLS)


@inlined
def softmax_step(call, tile, start, first, last, keep, memory):
    """Turns scores into weights, with the sums so far brought to the new maximum."""
    for row in range(first, last):
        p, weights = memory + P + P_BYTES * row, memory + W + P_BYTES * row
        higher, total = raise_maximum(call, tile, start, row, memory)
        for j in range(0, BLOCK, 16):
            total = total + keep(weights, j, exp2(load(p + 4 * j) - higher))
        store(memory + LANE + LANE_BYTES * row, total)


@inlined
def raise_maximum(call, tile, start, row, memory):
    """Caps and masks a row's scores, and brings its sums so far to the new maximum; returns that and the sums of
    weights."""
    position, p, o = tile.position + row // call.group, memory + P + P_BYTES * row, memory + O + ROW_BYTES * row
    top = memory + TOP + 4 * row
    if call.cap > ZERO:
        for i in range(0, P_BYTES, 64):
            store(p + i, soft_capped(load(p + i), call.cap))
    low, high = first_key(call, position) - start, position + 1 - start
    if low > 0 or high < BLOCK:
        for j in range(0, BLOCK, 16):
            slot = to_f32(lane_numbers()) + np.float32(j)
            seen = where_below(slot, np.float32(high), load(p + 4 * j), lanes(MASKED))
            store(p + 4 * j, where_below(slot, np.float32(low), lanes(MASKED), seen))
    higher = max_lanes(maximum(maximum(load(p), load(p + 64)), maximum(load(p + 128), load(p + 192)))) + ZERO
    total = lanes(ZERO)
    if start % SPAN == 0 or low >= 0 and call.window > 0:  # the row's first block of the span
        for i in range(0, 4 * call.head_dim, 64):
            store(o + i, total)
    else:
        before, total = peek(top, float32), load(memory + LANE + LANE_BYTES * row)
        if higher > before:
            shrink = exp2(before - higher)
            total = cleared(total * shrink)
            for i in range(0, 4 * call.head_dim, 64):
                store(o + i, cleared(load(o + i) * shrink))
        else:  # the factor is exactly 1
            higher = before
    poke(top, higher)
    return higher, total


@inlined
def values(call, tile, v, ahead, start, first, last, each, step, memory):
    """o += w . v of rows first..last: HEIGHT rows at a time where all see the whole block, others by `ragged_values`.

    A slot that a row does not see must not reach it, not even as 0 * v: v may be anything there.
    """
    whole, end, x_bytes = first, last, 4 if each == 1 else PAIR_BYTES
    if start + BLOCK - 1 > tile.position:  # rows from `whole` to `end` see all slots
        whole = max(first, (start + BLOCK - 1 - tile.position) * call.group)
    if call.window > 0:
        end = min(last, (start + call.window - tile.position) * call.group)
    high = whole + max(0, end - whole) // HEIGHT * HEIGHT if last - first > FEW_ROWS else whole
    wide = call.head_dim // (16 * COLS) * (16 * COLS)
    for d in range(0, wide, 16 * COLS):
        for row in range(whole, high, HEIGHT):
            o = memory + O + ROW_BYTES * row + 4 * d
            acc = tile_load(HEIGHT, COLS, o, ROW_BYTES)
            for i in range(BLOCK // each):
                acc = step(acc, memory + W + P_BYTES * row + x_bytes * i, P_BYTES, v + 4 * (call.head_dim * i + d), ALL)
            tile_store(acc, o, ROW_BYTES, COLS)
    row = first
    while row < last:
        inside = whole <= row < high
        same_token = row + 1 < last and (row + 1) // call.group == row // call.group
        pair, done = 1 if same_token and (row + 1 < high or not inside) else 0, wide if inside else 0
        if not inside or wide < call.head_dim:
            ragged_values(call, tile, v, ahead if row == first else v, start, row, pair, done, each, step, memory)
        row += 1 + pair


@inlined
def ragged_values(call, tile, v, ahead, start, row, pair, done, each, step, memory):
    """o += w . v of a row, or of two that see the same slots, from dimension `done` on; only these slots are visited.

    What lies at `ahead` is asked for meanwhile.
    """
    position, x_bytes = tile.position + row // call.group, 4 if each == 1 else PAIR_BYTES
    weights, o, width = memory + W + P_BYTES * row, memory + O + ROW_BYTES * row, 4 * call.head_dim
    low, high = max(0, first_key(call, position) - start), min(BLOCK, position + 1 - start)
    wide = done + (call.head_dim - done) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(done, wide, 16 * FEW_COLS):
        two = tile_load(2, FEW_COLS, o + 4 * d, ROW_BYTES * pair)
        for i in range(low // each, (high + each - 1) // each):
            two = step(two, weights + x_bytes * i, P_BYTES * pair, v + width * i + 4 * d, halves(each * i, low, high))
            for line in range(FEW_COLS):
                prefetch(ahead + 4 * BLOCK // each * d + 64 * (FEW_COLS * i + line))
        tile_store(two, o + 4 * d, ROW_BYTES * pair, FEW_COLS)
    for d in range(wide, call.head_dim, 16):
        one = tile_load(2, 1, o + 4 * d, ROW_BYTES * pair)
        for i in range(low // each, (high + each - 1) // each):
            one = step(one, weights + x_bytes * i, P_BYTES * pair, v + width * i + 4 * d, halves(each * i, low, high))
        tile_store(one, o + 4 * d, ROW_BYTES * pair, 1)


@inlined
def halves(slot, low, high):
    """Mask of a pair that begins at an even slot: the half of a slot outside low..high is not to be read."""
    return (0xFFFF if slot >= low else 0) | (-65536 if slot + 1 < high else 0)
