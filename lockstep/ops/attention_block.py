"""One block of keys against a tile of query rows: scores, softmax step, values. The inner part of the fast attention.

A tile's rows are the query heads of one kv head for some consecutive tokens, so that a block of K and V is read from
memory once for all of them, and widened to float32 once. Scratch memory, on the thread's stack:

    q [ROWS, 256] scaled queries    o [ROWS, 256] sums of values    p [ROWS, 64] scores, then weights
    lane [ROWS, 16] sums of weights    top [ROWS] largest score    panels [width / 16, rows of the page, 16] of K or V

Few, large functions: each level of nesting compiles everything below it again.
"""
from collections import namedtuple

import numpy as np
from numba import float32, int32

from lockstep.ops.attention_math import BLOCK, SPAN, ZERO, exp2, soft_capped
from lockstep.runtime.kernel import inlined
from lockstep.runtime.machine import prefetch
from lockstep.runtime.simd import lanes, load, load_bf16, max_lanes, maximum, peek, poke, store
from lockstep.runtime.targets import wide_registers
from lockstep.runtime.tiles import tile_fma_f32, tile_fma_widened, tile_load, tile_store, tile_zeros

COLS = 2 if wide_registers() else 1  # 6 x COLS x 16 lanes of accumulators fill the registers
ROWS, FEW_ROWS = 96, 5  # of a tile at most; few rows work on the pages directly, many on panels
MASKED = np.float32(-3e38)
MAX_HEAD_DIM = 256
ROW_BYTES, P_BYTES, LANE_BYTES = 4 * MAX_HEAD_DIM, 4 * BLOCK, 64
Q = 0
O = Q + ROWS * ROW_BYTES
P = O + ROWS * ROW_BYTES
LANE = P + ROWS * P_BYTES
TOP = LANE + ROWS * LANE_BYTES
PANELS = TOP + 4 * ROWS
SCRATCH_BYTES = PANELS + 4 * BLOCK * (MAX_HEAD_DIM + 64)

Call = namedtuple("Call", "out stats q k_pages v_pages gate gate_bytes gate_stride heads kv_heads head_dim group window bf16 scale cap")
Tile = namedtuple("Tile", "token tokens position head kv_head table")


@inlined
def first_key(call, position):
    """The first key that a query sees."""
    return max(0, position + 1 - call.window) if call.window > 0 else 0


@inlined
def attend_span(call, tile, span, memory):
    """Adds the blocks of one span to the rows that see any of their keys.

    While a block's keys are worked on, its values come from memory, and then the next block's keys.
    """
    first_block = max(first_key(call, tile.position), span * SPAN) // BLOCK
    last_block = min(tile.position + tile.tokens - 1, (span + 1) * SPAN - 1) // BLOCK
    size = (2 if call.bf16 else 4) * BLOCK * call.head_dim
    ahead = size * (np.int64(peek(tile.table + 4 * first_block, int32)) * call.kv_heads + tile.kv_head)
    for block in range(first_block, last_block + 1):
        start, last, page = block * BLOCK, tile.tokens, ahead
        if call.window > 0:
            last = min(last, start + BLOCK - 1 + call.window - tile.position)
        first, last = max(0, start - tile.position) * call.group, last * call.group
        next_page = np.int64(peek(tile.table + 4 * min(block + 1, last_block), int32))
        ahead = size * (next_page * call.kv_heads + tile.kv_head)
        few = last - first <= FEW_ROWS
        if few:
            direct_scores(call, call.k_pages + page, call.v_pages + page, first, last, memory)
        else:
            pack_panels(call.k_pages + page, call.v_pages + page, call.bf16, call.head_dim, BLOCK, memory + PANELS)
            scores(call.head_dim, first, last, memory)
        softmax_step(call, tile, block, first, last, memory)
        if few:
            direct_values(call, tile, call.v_pages + page, call.k_pages + ahead, start, first, last, memory)
        else:
            pack_panels(call.v_pages + page, call.k_pages + ahead, call.bf16, BLOCK, call.head_dim, memory + PANELS)
            values(call, tile, block, first, last, memory)


@inlined
def pack_panels(page, ahead, bf16, num_rows, width, panels):
    """A page [num_rows, width] as float32 panels of sixteen columns: contiguous, so that they share a cache well.

    The lines at `ahead` are needed next: they come from memory while this page is worked on.
    """
    if bf16:
        for row in range(num_rows):
            for i in range(0, width, 16):
                prefetch(ahead + 2 * (row * width + i))
                store(panels + 4 * (i * num_rows + 16 * row), load_bf16(page + 2 * (row * width + i)))
    else:
        for row in range(num_rows):
            for i in range(0, width, 16):
                prefetch(ahead + 4 * (row * width + i))
                store(panels + 4 * (i * num_rows + 16 * row), load(page + 4 * (row * width + i)))


@inlined
def page_chain(acc, bf16, x, x_row, page, row_bytes, low, high, ahead):
    """acc[r, c] = fma(x[r, i], row i of a page, acc[r, c]) for rows low..high: two rows of x by a few columns.

    Meanwhile as much comes from memory at `ahead`, line after line: out of order the memory gives half its speed.
    """
    for i in range(low, high if bf16 else low):
        acc = tile_fma_widened(acc, x + 4 * i, x_row, page + row_bytes * i, 32)
        prefetch(ahead + 64 * i)
    for i in range(low, low if bf16 else high):
        acc = tile_fma_f32(acc, x + 4 * i, x_row, page + row_bytes * i, 64)
        prefetch(ahead + 128 * i)
        prefetch(ahead + 128 * i + 64)
    return acc


@inlined
def direct_scores(call, k, ahead, first, last, memory):
    """q . k of a few rows over the page itself, two at a time; a row without a partner is its own."""
    size = 2 if call.bf16 else 4
    for row in range(first, last, 2):
        pair, asked = 1 if row + 1 < last else 0, ahead if row + 2 >= last else k
        for j in range(0, BLOCK, 32):
            acc = page_chain(tile_zeros(2, 2), call.bf16, memory + Q + ROW_BYTES * row, ROW_BYTES * pair, k + size * j,
                             size * BLOCK, 0, call.head_dim, asked + size * call.head_dim * j)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES * pair, 2)


@inlined
def direct_values(call, tile, v, ahead, start, first, last, memory):
    """o += p . v of a few rows over the page itself, two at a time if they see the same slots: only those are visited."""
    size, row, wide = 2 if call.bf16 else 4, first, call.head_dim // 32 * 32
    while row < last:
        position, p, o = tile.position + row // call.group, memory + P + P_BYTES * row, memory + O + ROW_BYTES * row
        low, high = max(0, first_key(call, position) - start), min(BLOCK, position + 1 - start)
        pair = 1 if row + 1 < last and (row + 1) // call.group == row // call.group else 0
        asked = ahead if row + pair + 1 >= last else v
        for d in range(0, wide, 32):
            acc = page_chain(tile_load(2, 2, o + 4 * d, ROW_BYTES * pair), call.bf16, p, P_BYTES * pair, v + size * d,
                             size * call.head_dim, low, high, asked + size * BLOCK * d)
            tile_store(acc, o + 4 * d, ROW_BYTES * pair, 2)
        for d in range(wide, call.head_dim, 16):
            end = page_chain(tile_load(2, 1, o + 4 * d, ROW_BYTES * pair), call.bf16, p, P_BYTES * pair, v + size * d,
                             size * call.head_dim, low, high, asked + size * BLOCK * d)
            tile_store(end, o + 4 * d, ROW_BYTES * pair, 1)
        row += 1 + pair


@inlined
def scores(head_dim, first, last, memory):
    """q . k of rows first..last and all slots of the block: six rows at a time, then one by one."""
    panel_bytes, six = 64 * head_dim, first + (last - first) // 6 * 6
    for c in range(0, BLOCK // 16, COLS):
        for row in range(first, six, 6):
            q, panel, acc = memory + Q + ROW_BYTES * row, memory + PANELS + panel_bytes * c, tile_zeros(6, COLS)
            for d in range(head_dim):
                acc = tile_fma_f32(acc, q + 4 * d, ROW_BYTES, panel + 64 * d, panel_bytes)
            tile_store(acc, memory + P + P_BYTES * row + 64 * c, P_BYTES, COLS)
    for row in range(six, last):
        q, one = memory + Q + ROW_BYTES * row, tile_zeros(1, 4)
        for d in range(head_dim):
            one = tile_fma_f32(one, q + 4 * d, 0, memory + PANELS + 64 * d, panel_bytes)
        tile_store(one, memory + P + P_BYTES * row, 0, 4)


@inlined
def softmax_step(call, tile, block, first, last, memory):
    """Turns scores into weights, with the sums so far brought to the new maximum."""
    start = block * BLOCK
    for row in range(first, last):
        position, p, lane = tile.position + row // call.group, memory + P + P_BYTES * row, memory + LANE + LANE_BYTES * row
        top, o = memory + TOP + 4 * row, memory + O + ROW_BYTES * row
        if call.cap > ZERO:
            for i in range(0, P_BYTES, 64):
                store(p + i, soft_capped(load(p + i), call.cap))
        seen = first_key(call, position) - start
        for j in range(0, seen):
            poke(p + 4 * j, MASKED)
        for j in range(position + 1 - start, BLOCK):
            poke(p + 4 * j, MASKED)
        higher = max_lanes(maximum(maximum(load(p), load(p + 64)), maximum(load(p + 128), load(p + 192)))) + ZERO
        total = lanes(ZERO)
        if start % SPAN == 0 or seen >= 0 and call.window > 0:  # the row's first block of the span
            for i in range(0, 4 * call.head_dim, 64):
                store(o + i, total)
        else:
            before, total = peek(top, float32), load(lane)
            if higher > before:
                shrink = exp2(before - higher)
                total = total * shrink
                for i in range(0, 4 * call.head_dim, 64):
                    store(o + i, load(o + i) * shrink)
            else:  # the factor is exactly 1
                higher = before
        for i in range(0, P_BYTES, 64):
            weight = exp2(load(p + i) - higher)
            store(p + i, weight)
            total = total + weight
        store(lane, total)
        poke(top, higher)


@inlined
def values(call, tile, block, first, last, memory):
    """o += p . v of rows first..last: tiles of six rows where all see the whole block, other rows one by one.

    A slot that a row does not see must not reach it, not even as 0 * v: v may be anything there.
    """
    start, panel_bytes = block * BLOCK, 64 * BLOCK
    whole, end = first, last  # rows that see all slots
    if start + BLOCK - 1 > tile.position:
        whole = max(first, (start + BLOCK - 1 - tile.position) * call.group)
    if call.window > 0:
        end = min(last, (start + call.window - tile.position) * call.group)
    six = whole + max(0, end - whole) // 6 * 6
    for c in range(0, call.head_dim // 16, COLS):
        for row in range(whole, six, 6):
            p, panel, o = memory + P + P_BYTES * row, memory + PANELS + panel_bytes * c, memory + O + ROW_BYTES * row + 64 * c
            acc = tile_load(6, COLS, o, ROW_BYTES)
            for j in range(BLOCK):
                acc = tile_fma_f32(acc, p + 4 * j, P_BYTES, panel + 64 * j, panel_bytes)
            tile_store(acc, o, ROW_BYTES, COLS)
    for c in range(0, call.head_dim // 16, 4):
        for row in range(first, last):
            if whole <= row < six:
                continue
            position = tile.position + row // call.group
            p, panel, o = memory + P + P_BYTES * row, memory + PANELS + panel_bytes * c, memory + O + ROW_BYTES * row + 64 * c
            one = tile_load(1, 4, o, 0)
            for j in range(max(0, first_key(call, position) - start), min(BLOCK, position + 1 - start)):
                one = tile_fma_f32(one, p + 4 * j, 0, panel + 64 * j, panel_bytes)
            tile_store(one, o, 0, 4)
