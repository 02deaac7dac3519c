"""One block of keys of the 8-bit cache against a tile of query rows. What a tile is, and its scratch, is told in
`attention_block`; here a row of scratch holds

    q   codes as the target multiplies them, then scale (float32) and start (int32) of a score's sum
    p   exact dots (int32), then scores (float32)
    w   codes of weights (int16), then their scale (float32)

A row of a page is four dimensions of 64 keys, or all dimensions of four values. Slots that a row does not see have
weight 0: whatever codes they hold, they add nothing to an integer sum, and what their scales make is not taken.
"""

import numpy as np
from numba import float32, int32

from lockstep.ops.activations import HIGHEST, ONE_127TH, SMALLEST, magnitude
from lockstep.ops.activations_cpu import finite
from lockstep.ops.attention_block import (
    COLS,
    FEW_COLS,
    FEW_ROWS,
    HEIGHT,
    LANE,
    LANE_BYTES,
    P_BYTES,
    ROW_BYTES,
    SCALES,
    O,
    P,
    Pair,
    Q,
    W,
    blocks_of,
    raise_maximum,
    rows_that_see,
)
from lockstep.ops.attention_math import BLOCK, ZERO, cleared, exp2, score_scales
from lockstep.ops.attention_q8 import MOST, ONE_MOST
from lockstep.ops.kv_cache_q8 import head_place, scale_place
from lockstep.runtime.kernel import inlined
from lockstep.runtime.machine import prefetch
from lockstep.runtime.simd import (
    lanes,
    load,
    load_bf16,
    load_i32,
    max_lanes,
    maximum,
    peek,
    poke,
    rint,
    store,
    store_i8,
    sum_lanes,
    to_f32,
    to_i32,
    where_below,
)
from lockstep.runtime.targets import unsigned_weights
from lockstep.runtime.tiles import tile_store
from lockstep.runtime.tiles_bytes import (
    OFFSET,
    store_words,
    tile_add_bytes,
    tile_add_scaled,
    tile_add_words,
    tile_int_spread,
    tile_int_zeros,
)

BYTES = unsigned_weights()  # whether the target multiplies bytes
Q_BYTES = 4 if BYTES else 8  # of four codes of a query
Q_SCALE, Q_START = 512, 516  # into a row of q
W_SCALE = 128  # into a row of w
K_ROW_BYTES = 4 * BLOCK


@inlined
def load_queries(a, tile, how, memory):
    """The tile's queries, scaled and quantized, one row after the other."""
    sm_scale, _ = score_scales(a.scale, a.soft_cap)
    for row in range(tile.tokens * tile.group):
        token, head = tile.token + row // tile.group, tile.head + row % tile.group
        source = a.q + 4 * a.head_dim * (a.num_heads * token + head)
        q, scaled = memory + Q + ROW_BYTES * row, memory + O + ROW_BYTES * row
        top, sums = lanes(ZERO), to_i32(lanes(ZERO))
        for i in range(0, 4 * a.head_dim, 64):
            x = cleared(load(source + i) * sm_scale)
            store(scaled + i, x)
            top = maximum(magnitude(x), top)
        amax = max_lanes(top)
        scale, inverse = amax * ONE_127TH, HIGHEST / amax
        if amax < SMALLEST:
            scale, inverse = ZERO, ZERO
        for d in range(0, a.head_dim, 16):
            codes = to_i32(rint(finite(load(scaled + 4 * d)) * inverse))
            sums = sums + codes
            if BYTES:
                store_i8(q + d, codes)
            else:
                store_words(q + 2 * d, codes)
        poke(q + Q_SCALE, scale)
        poke(q + Q_START, int32(OFFSET * sum_lanes(sums) if BYTES else 0))


@inlined
def attend_span(a, tile, span, how, memory):
    """Adds the blocks of one span to the rows that see any of their keys.

    While few rows work on a block's keys, its values come from memory, and then the next block's keys.
    """
    first_block, last_block = blocks_of(a, tile, span)
    ahead = head_at(a, tile, first_block)
    for number in range(first_block, last_block + 1):
        block, head = rows_that_see(a, tile, number), ahead
        ahead = head_at(a, tile, min(number + 1, last_block))
        scales(a, head, ahead, memory)
        scores(a, tile, block, a.k_pages + head, a.v_pages + head, memory)
        softmax_step(a, tile, block, memory)
        values(a, block, a.v_pages + head, a.k_pages + ahead, memory)


@inlined
def head_at(a, tile, block):
    """Bytes to the tile's kv head in the page of a block."""
    return head_place(np.int64(peek(tile.table + 4 * block, int32)), tile.kv_head, a.num_kv_heads, a.head_dim)


@inlined
def scales(a, head, ahead, memory):
    """Widens the scales of a block's keys and values; asks for those of the next block."""
    at = scale_place(0, a.head_dim)
    for j in range(0, BLOCK, 16):
        store(memory + SCALES + 4 * j, load_bf16(a.k_pages + head + at + 2 * j))
        store(memory + SCALES + 4 * (BLOCK + j), load_bf16(a.v_pages + head + at + 2 * j))
    for line in range(0, 2 * BLOCK, 64):
        prefetch(a.k_pages + ahead + at + line)
        prefetch(a.v_pages + ahead + at + line)


@inlined
def scores(a, tile, block, k, ahead, memory):
    """Dots of the block's rows with the slots that any of them sees: HEIGHT rows at a time, then two by two.

    A row without a partner is its own. Few rows ask for the lines of V at `ahead`, each pair for its share.
    """
    start, first, last = block
    steps, share, asked = a.head_dim // 4, lines_a_step(first, last), ahead
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    for row in range(first, high, HEIGHT):
        q = memory + Q + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // tile.group + 1 - start), 16 * COLS):
            acc = tile_int_spread(HEIGHT, COLS, q + Q_START, ROW_BYTES)
            for i in range(steps):
                acc = tile_add_bytes(acc, q + Q_BYTES * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, 64)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, last, 2):
        pair, q = 1 if row + 1 < last else 0, memory + Q + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + pair) // tile.group + 1 - start), 16 * FEW_COLS):
            two = tile_int_spread(2, FEW_COLS, q + Q_START, ROW_BYTES * pair)
            for i in range(steps):
                two = tile_add_bytes(two, q + Q_BYTES * i, ROW_BYTES * pair, k + K_ROW_BYTES * i + 4 * j, 64)
                asked = ask(asked, share)
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * pair, FEW_COLS)


@inlined
def ask(place, share):
    """Asks for 1, 2 or 4 lines, as they are shared; returns where the next ones are."""
    for line in range(FEW_COLS):
        prefetch(place + 64 * (line & share - 1))
    return place + 64 * share


@inlined
def lines_a_step(first, last):
    """How many of the lines that come next few rows ask for at each step, so that all pairs of rows ask for as many."""
    pairs = (last - first + 1) // 2
    return (FEW_COLS + pairs - 1) // pairs if last - first <= FEW_ROWS else 1


@inlined
def softmax_step(a, tile, block, memory):
    """Turns dots into scores and those into quantized weights, with the sums so far brought to the new maximum."""
    k_scales, v_scales = memory + SCALES, memory + SCALES + 4 * BLOCK
    for row in range(block.first, block.last):
        p, most = memory + P + P_BYTES * row, lanes(ZERO)
        q_scale = peek(memory + Q + ROW_BYTES * row + Q_SCALE, float32)
        for i in range(0, P_BYTES, 64):
            store(p + i, to_f32(load_i32(p + i)) * (load(k_scales + i) * q_scale))
        higher, total = raise_maximum(a, tile, block.start, row, memory)
        for i in range(0, P_BYTES, 64):
            x = exp2(load(p + i) - higher)
            total = total + x
            x = where_below(ZERO, x, x * load(v_scales + i), ZERO)
            store(p + i, x)
            most = maximum(x, most)
        store(memory + LANE + LANE_BYTES * row, total)
        quantize_weights(p, max_lanes(most), memory + W + P_BYTES * row)


@inlined
def quantize_weights(p, most, weights):
    """A row of 64 weights at p, the largest of them `most`, as words and their scale."""
    scale, inverse = most * ONE_MOST, MOST / most
    if most < SMALLEST:
        scale, inverse = ZERO, ZERO
    for j in range(0, BLOCK, 16):
        store_words(weights + 2 * j, to_i32(rint(load(p + 4 * j) * inverse)))
    poke(weights + W_SCALE, scale)


@inlined
def values(a, block, v, ahead, memory):
    """o += w . v of the block's rows: HEIGHT rows at a time, others two by two. Few rows ask for lines at `ahead`."""
    _, first, last = block
    share, asked = lines_a_step(first, last), ahead
    high = first + (last - first) // HEIGHT * HEIGHT if last - first > FEW_ROWS else first
    wide = a.head_dim // (16 * COLS) * (16 * COLS)
    for d in range(0, wide, 16 * COLS):
        for row in range(first, high, HEIGHT):
            weights, o = memory + W + P_BYTES * row, memory + O + ROW_BYTES * row + 4 * d
            acc = tile_int_zeros(HEIGHT, COLS)
            for i in range(BLOCK // 4):
                acc = tile_add_words(acc, weights + 8 * i, P_BYTES, v + 4 * (a.head_dim * i + d), 64)
            tile_add_scaled(acc, weights + W_SCALE, P_BYTES, o, ROW_BYTES)
    row = first
    while row < last:
        pair, done = 1 if row + 1 < last and row + 1 != high else 0, wide if row < high else 0
        if done < a.head_dim:
            two_rows(a, Pair(row, pair, done), v, asked, share, memory)
            asked += a.head_dim // (16 * FEW_COLS) * BLOCK // 4 * 64 * share
        row += 1 + pair


@inlined
def two_rows(a, rows, v, asked, share, memory):
    """o += w . v of a Pair of rows; at each step asks for `share` lines from `asked` on."""
    row, pair, done = rows
    weights, o = memory + W + P_BYTES * row, memory + O + ROW_BYTES * row
    wide = done + (a.head_dim - done) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(done, wide, 16 * FEW_COLS):
        two = tile_int_zeros(2, FEW_COLS)
        for i in range(BLOCK // 4):
            two = tile_add_words(two, weights + 8 * i, P_BYTES * pair, v + 4 * (a.head_dim * i + d), 64)
            asked = ask(asked, share)
        tile_add_scaled(two, weights + W_SCALE, P_BYTES * pair, o + 4 * d, ROW_BYTES * pair)
    for d in range(wide, a.head_dim, 16):
        one = tile_int_zeros(2, 1)
        for i in range(BLOCK // 4):
            one = tile_add_words(one, weights + 8 * i, P_BYTES * pair, v + 4 * (a.head_dim * i + d), 64)
        tile_add_scaled(one, weights + W_SCALE, P_BYTES * pair, o + 4 * d, ROW_BYTES * pair)
