"""Pages of the 8-bit cache: scores and values of a block of keys for a tile of query rows. A row of scratch holds

    q   codes in the form that the target multiplies, then their scale (float32) and the start value of dots (int32)
    o   sums of values; while the queries are loaded, the numbers of a query
    p   exact dots (int32), then scores (float32), then codes of weights (int16) and their scale (float32)
    own [2, 64] scales of a block's keys and values

A row of a page is four dimensions of 64 keys, or all dimensions of four values. Slots that a row does not see have
weight 0: whatever codes they hold add nothing to an integer sum, and their scales are not used.
"""

from lockstep.native.kernel import inlined
from lockstep.native.machine import prefetch
from lockstep.native.numbers import float32, int32
from lockstep.native.simd import (
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
from lockstep.native.targets import TARGET
from lockstep.native.tiles import tile_store
from lockstep.native.tiles_bytes import (
    OFFSET,
    store_words,
    tile_add_bytes,
    tile_add_scaled,
    tile_add_words,
    tile_int_spread,
    tile_int_zeros,
)
from lockstep.ops.attention.attention_q8 import MAX_CODE, ONE_CODE
from lockstep.ops.attention.formulas import BLOCK, MAX_HEAD_DIM, ZERO, exp2
from lockstep.ops.attention.kv_cache_q8 import head_place, scale_place
from lockstep.ops.attention.pages import (
    COLS,
    FEW_COLS,
    FEW_ROWS,
    HEIGHT,
    K_ROW_BYTES,
    NEAR_STEPS,
    RowPair,
    page_of,
    prefetch_near_keys,
    prefetch_near_values,
)
from lockstep.ops.attention.softmax import OWN, P_BYTES, ROW_BYTES, Layout, O, P, Q
from lockstep.ops.elementwise.activations import HIGHEST, ONE_127TH, SMALLEST, finite, magnitude

BYTES = TARGET.unsigned  # whether the target multiplies bytes
Q_BYTES = 4 if BYTES else 8  # of four codes of a query: bytes or 16-bit words
Q_SCALE, Q_START = 2 * MAX_HEAD_DIM, 2 * MAX_HEAD_DIM + 4  # offsets in a row of q
W_SCALE = 2 * BLOCK  # offset in a row of p, after the codes
K_SCALES, V_SCALES = OWN, OWN + 4 * BLOCK
SCRATCH_BYTES = OWN + 8 * BLOCK


@inlined
def store_query(arithmetic, row, d, x, memory):
    store(memory + O + ROW_BYTES * row + 4 * d, x)


@inlined
def quantize_query(call, row, memory):
    """Quantizes a query, from its row of o to its row of q."""
    q, scaled = memory + Q + ROW_BYTES * row, memory + O + ROW_BYTES * row
    top, sums = lanes(ZERO), to_i32(lanes(ZERO))
    for i in range(0, 4 * call.head_dim, 64):
        top = maximum(magnitude(load(scaled + i)), top)
    amax = max_lanes(top)
    scale, inverse = amax * ONE_127TH, HIGHEST / amax
    if amax < SMALLEST:
        scale, inverse = ZERO, ZERO
    for d in range(0, call.head_dim, 16):
        codes = to_i32(rint(finite(load(scaled + 4 * d)) * inverse))
        sums = sums + codes
        if BYTES:
            store_i8(q + d, codes)
        else:
            store_words(q + 2 * d, codes)
    poke(q + Q_SCALE, scale)
    poke(q + Q_START, int32(OFFSET * sum_lanes(sums) if BYTES else 0))


@inlined
def head_bytes(call, head):
    """Where a head begins, in bytes from the first page."""
    return head_place(head.place, head.kv_head, call.num_kv_heads, call.head_dim)


@inlined
def widen_scales(call, here, ahead, memory):
    """Widens the scales of a block's keys and values, and prefetches the next ones. here, ahead: bytes from the first
    page to the head and to the next one."""
    at = scale_place(0, call.head_dim)
    for j in range(0, BLOCK, 16):
        store(memory + K_SCALES + 4 * j, load_bf16(call.k + here + at + 2 * j))
        store(memory + V_SCALES + 4 * j, load_bf16(call.v + here + at + 2 * j))
    for line in range(0, 2 * BLOCK, 64):
        prefetch(call.k + ahead + at + line)
        prefetch(call.v + ahead + at + line)


@inlined
def scores(call, arithmetic, tile, block, head, next_head, memory):
    """Dots of the block's rows with the slots that any of them sees: HEIGHT rows at a time, then two at a time, or one
    where a row is left.

    The rows that are taken two at a time prefetch V: each pair of rows a share of its lines, and what follows soon.
    """
    (start, first, end), here = block, head_bytes(call, head)
    widen_scales(call, here, head_bytes(call, next_head), memory)
    k, ahead, queries = call.k + here, call.v + here, memory + Q + ROW_BYTES * head.first_row
    num_steps, num_lines = call.head_dim // 4, lines_per_step(first, end)
    high = first + (end - first) // HEIGHT * HEIGHT if end - first > FEW_ROWS else first
    for row in range(first, high, HEIGHT):
        q = queries + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + HEIGHT - 1) // call.unit_heads + 1 - start), 16 * COLS):
            acc = tile_int_spread(HEIGHT, COLS, q + Q_START, ROW_BYTES)
            for i in range(num_steps):
                acc = tile_add_bytes(acc, q + Q_BYTES * i, ROW_BYTES, k + K_ROW_BYTES * i + 4 * j, 64)
            tile_store(acc, memory + P + P_BYTES * row + 4 * j, P_BYTES, COLS)
    for row in range(high, end, 2):
        second, q = 1 if row + 1 < end else 0, queries + ROW_BYTES * row
        for j in range(0, min(BLOCK, tile.position + (row + second) // call.unit_heads + 1 - start), 16 * FEW_COLS):
            two = tile_int_spread(2, FEW_COLS, q + Q_START, ROW_BYTES * second)
            for i in range(num_steps):
                two = tile_add_bytes(two, q + Q_BYTES * i, ROW_BYTES * second, k + K_ROW_BYTES * i + 4 * j, 64)
                ahead = prefetch_lines(ahead, num_lines)
                prefetch_near_keys(k + 4 * j, call.v + here, i + NEAR_STEPS, num_steps, 4 * call.head_dim)
            tile_store(two, memory + P + P_BYTES * row + 4 * j, P_BYTES * second, FEW_COLS)


@inlined
def prefetch_lines(place, num_lines):
    """Prefetches 1, 2 or 4 lines from `place` on; returns where the next ones are."""
    for line in range(FEW_COLS):
        prefetch(place + 64 * (line & num_lines - 1))
    return place + 64 * num_lines


@inlined
def lines_per_step(first, end):
    """How many lines a pair of rows first .. end - 1 prefetches at each step: where there are few rows, their pairs
    share the lines equally."""
    num_pairs = (end - first + 1) // 2
    return (FEW_COLS + num_pairs - 1) // num_pairs if end - first <= FEW_ROWS else 1


@inlined
def scale_scores(call, p, row, memory):
    """Turns a row of dots into scores, in place."""
    q_scale = peek(memory + Q + ROW_BYTES * row + Q_SCALE, float32)
    for i in range(0, P_BYTES, 64):
        store(p + i, to_f32(load_i32(p + i)) * (load(memory + K_SCALES + i) * q_scale))


@inlined
def weigh(arithmetic, p, higher, sums, memory):
    """Turns a row of scores into codes of weights times the scales of values, in place; returns `sums` with the weights
    added."""
    largest = lanes(ZERO)
    for i in range(0, P_BYTES, 64):
        x = exp2(load(p + i) - higher)
        sums = sums + x
        x = where_below(ZERO, x, x * load(memory + V_SCALES + i), ZERO)
        store(p + i, x)
        largest = maximum(x, largest)
    quantize_weights(p, max_lanes(largest))
    return sums


@inlined
def quantize_weights(p, largest):
    """Turns a row of 64 weights at p, the largest of them `largest`, into 16-bit codes and their scale, in place."""
    scale, inverse = largest * ONE_CODE, MAX_CODE / largest
    if largest < SMALLEST:
        scale, inverse = ZERO, ZERO
    for j in range(0, BLOCK, 16):
        store_words(p + 2 * j, to_i32(rint(load(p + 4 * j) * inverse)))
    poke(p + W_SCALE, scale)


@inlined
def add_values(call, arithmetic, tile, block, head, next_head, memory):
    """o += w . v of the block's rows: HEIGHT rows at a time, then two at a time, or one where a row is left.

    The rows that are taken two at a time prefetch the next keys.
    """
    _, first, end = block
    v, unit_sums = call.v + head_bytes(call, head), memory + O + ROW_BYTES * head.first_row
    num_lines, k_ahead = lines_per_step(first, end), call.k + head_bytes(call, next_head)
    ahead = k_ahead
    high = first + (end - first) // HEIGHT * HEIGHT if end - first > FEW_ROWS else first
    wide = call.head_dim // (16 * COLS) * (16 * COLS)
    for d in range(0, wide, 16 * COLS):
        for row in range(first, high, HEIGHT):
            weights, o = memory + P + P_BYTES * row, unit_sums + ROW_BYTES * row + 4 * d
            acc = tile_int_zeros(HEIGHT, COLS)
            for i in range(BLOCK // 4):
                acc = tile_add_words(acc, weights + 8 * i, P_BYTES, v + 4 * (call.head_dim * i + d), 64)
            tile_add_scaled(acc, weights + W_SCALE, P_BYTES, o, ROW_BYTES)
    row = first
    while row < end:
        second, start_dim = 1 if row + 1 < end and row + 1 != high else 0, wide if row < high else 0
        if start_dim < call.head_dim:
            pair = RowPair(row, second, start_dim, unit_sums + ROW_BYTES * row)
            add_pair_values(call, pair, v, ahead, num_lines, k_ahead, memory)
            ahead += call.head_dim // (16 * FEW_COLS) * BLOCK // 4 * 64 * num_lines
        row += 1 + second


@inlined
def add_pair_values(call, pair, v, ahead, num_lines, k_ahead, memory):
    """o += w . v of a RowPair; each step prefetches `num_lines` lines from `ahead` on, and once more what it reads
    NEAR_STEPS later, at last of the keys at k_ahead."""
    second, start_dim, o, weights = pair.second, pair.start_dim, pair.sums, memory + P + P_BYTES * pair.row
    wide = start_dim + (call.head_dim - start_dim) // (16 * FEW_COLS) * (16 * FEW_COLS)
    for d in range(start_dim, wide, 16 * FEW_COLS):
        two = tile_int_zeros(2, FEW_COLS)
        for i in range(BLOCK // 4):
            two = tile_add_words(two, weights + 8 * i, P_BYTES * second, v + 4 * (call.head_dim * i + d), 64)
            ahead = prefetch_lines(ahead, num_lines)
            is_last = d + 16 * FEW_COLS >= wide
            prefetch_near_values(v + 4 * d, k_ahead, i + NEAR_STEPS, BLOCK // 4, 4 * call.head_dim, is_last)
        tile_add_scaled(two, weights + W_SCALE, P_BYTES * second, o + 4 * d, ROW_BYTES * second)
    for d in range(wide, call.head_dim, 16):
        one = tile_int_zeros(2, 1)
        for i in range(BLOCK // 4):
            one = tile_add_words(one, weights + 8 * i, P_BYTES * second, v + 4 * (call.head_dim * i + d), 64)
        tile_add_scaled(one, weights + W_SCALE, P_BYTES * second, o + 4 * d, ROW_BYTES * second)


QUANTIZED = Layout(store_query, quantize_query, page_of, scores, scale_scores, weigh, add_values, 0)
